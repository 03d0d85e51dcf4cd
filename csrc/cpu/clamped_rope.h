// Clamped rotary embedding: rows of x rotated by min(position, max_position).
// Included inside namespace lminf::cpu::LMINF_ISA.

template <typename T>
void clamped_rope(const ClampedRopeParams& p, const Rotary& rotary, const Threads& threads) {
  const int dim = static_cast<int>(p.head_dim);
  const int dim_padded = (dim + kLanes - 1) / kLanes * kLanes;
  threads.parallel_for(p.batch * p.seqlen, [&](int64_t begin, int64_t end) {
    Scratch scratch(2 * Scratch::bytes<float>(rotary.pairs) + Scratch::bytes<float>(dim_padded));
    float* cos = scratch.take<float>(rotary.pairs);
    float* sin = scratch.take<float>(rotary.pairs);
    float* row = scratch.take<float>(dim_padded);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / p.seqlen, s = n % p.seqlen;
      int64_t position = p.position_ids[b * p.position_batch_stride + s];
      if (p.has_max_position) position = min64(position, p.max_position);
      rotation_table(position, rotary, rotary.scaling, cos, sin);
      for (int64_t h = 0; h < p.heads; ++h) {
        load_row(static_cast<const T*>(p.x) + b * p.x_stride.batch + h * p.x_stride.head +
                     s * p.x_stride.seq,
                 dim, row, dim_padded);
        rotate_row(rotary, cos, sin, row);
        store_row(row, dim,
                  static_cast<T*>(p.out) + b * p.out_stride.batch + h * p.out_stride.head +
                      s * p.out_stride.seq);
      }
    }
  });
}
