// Clamped rotary embedding: rows of x rotated by min(position, max_position).
// Included inside namespace lminf::cpu::LMINF_ISA.

// Rows of a head are next to each other, the heads of a row far apart. So a block of rows has its
// angles worked out once, and is then rotated head by head.
constexpr int64_t kRopeRows = 32;

template <typename T>
void run(const ClampedRopeParams& p, const Rotary& rotary, const Threads& threads) {
  const int dim = static_cast<int>(p.head_dim);
  const int dim_padded = (dim + kLanes - 1) / kLanes * kLanes;
  const int64_t blocks = (p.seqlen + kRopeRows - 1) / kRopeRows;
  threads.parallel_for(p.batch * blocks, [&](int64_t begin, int64_t end) {
    const int64_t angles = kRopeRows * rotary.pairs;
    Scratch scratch(2 * Scratch::bytes<float>(angles) + Scratch::bytes<float>(dim_padded));
    float* cos = scratch.take<float>(angles);
    float* sin = scratch.take<float>(angles);
    float* row = scratch.take<float>(dim_padded);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / blocks, first = n % blocks * kRopeRows;
      const int64_t rows = min64(kRopeRows, p.seqlen - first);
      for (int64_t r = 0; r < rows; ++r) {
        int64_t position = p.position_ids[b * p.position_batch_stride + first + r];
        if (p.has_max_position) position = min64(position, p.max_position);
        rotation_table(position, rotary, rotary.scaling, cos + r * rotary.pairs,
                       sin + r * rotary.pairs);
      }
      for (int64_t h = 0; h < p.heads; ++h) {
        const T* x = row_at<const T>(p.x, p.x_stride, b, h, first);
        T* out = row_at<T>(p.out, p.out_stride, b, h, first);
        for (int64_t r = 0; r < rows; ++r) {
          load_row(x + r * p.x_stride.seq, dim, row, dim_padded);
          rotate_row(rotary, cos + r * rotary.pairs, sin + r * rotary.pairs, row);
          store_row(row, dim, out + r * p.out_stride.seq);
        }
      }
    }
  });
}
