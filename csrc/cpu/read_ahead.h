// Rows of memory that will be wanted soon, asked for line by line while other work goes on: a core
// has few misses under way at a time, so they are spread evenly over that work.
// Included inside namespace lminf::cpu::LMINF_ISA.
class ReadAhead {
 public:
  // Forgets what is left. Rows have so many bytes.
  void restart(int64_t row_bytes) {
    runs_ = next_ = 0, offset_ = 0, lines_ = 0, pace_ = 0;
    row_bytes_ = row_bytes;
  }

  // Rows to come, `stride` bytes from one to the next.
  void add(const void* row, int64_t stride, int64_t rows) {
    if (rows <= 0 || runs_ == kMaxRuns) return;
    run_[runs_++] = {static_cast<const char*>(row), stride, rows};
    lines_ += rows * ((row_bytes_ + kLine - 1) / kLine);
  }

  // All of it within so many steps.
  void spread(int64_t steps) { pace_ = (lines_ + steps - 1) / max64(steps, 1); }

  void step() {
    for (int64_t n = pace_; n > 0 && next_ < runs_; --n) {
      Run& run = run_[next_];
      prefetch(run.row + offset_);
      offset_ += kLine;
      if (offset_ < row_bytes_) continue;
      offset_ = 0, run.row += run.stride;
      if (--run.rows == 0) ++next_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int kMaxRuns = 2 + 2 * kMaxHeadsPerTask;
  struct Run {
    const char* row;
    int64_t stride, rows;
  };
  Run run_[kMaxRuns];
  int runs_ = 0, next_ = 0;
  int64_t offset_ = 0, row_bytes_ = 0, lines_ = 0, pace_ = 0;
};
