// What a thread of the backward works in: packed tiles, a block of rows, the gradients that it
// holds. Included inside namespace lminf::cpu::LMINF_ISA.

template <typename E>
struct BackwardScratch {
  struct Sizes {
    int rows;  // of a block, padded
    int dim_padded;
    int64_t window_tiles;  // whose gradients are kept at one time
    int64_t global_tiles;  // the same for each of the other two branches
    int64_t window_slots;  // packed tiles
    int64_t global_slots;
  };

  BackwardScratch(const Sizes& n, const Rotary& rotary)
      : sizes(n), memory(bytes(n, rotary)), rotation(memory, rotary, kTileKeys<E>) {
    const int64_t block = int64_t{n.rows} * n.dim_padded;
    queries = memory.take<E>(block), grads = memory.take<E>(block);
    query_columns = memory.take<E>(n.dim_padded * kColumnStride<E>);
    grad_columns = memory.take<E>(n.dim_padded * kColumnStride<E>);
    query_grads = memory.take<float>(block);
    row_state = memory.take<GradRow>(n.rows);
    scores = memory.take<float>(kBlockRows<E> * kStripKeys);
    grad_probs = memory.take<float>(kBlockRows<E> * kStripKeys);
    score_grads = memory.take<E>(kBlockRows<E> * kProbStride<E>);
    prob_panels = memory.take<E>(kTileKeys<E> / kLanes * kPanelStride<E>);
    grad_panels = memory.take<E>(kTileKeys<E> / kLanes * kPanelStride<E>);
    rows = memory.take<E>(kTileKeys<E> * n.dim_padded);
    float_rows = memory.take<float>((kLanes + 1) * n.dim_padded);
    biases = memory.take<float>(kMaxHeadsPerTask * kBiasStride<E>);
    bias_grads = memory.take<float>(kMaxHeadsPerTask * kBiasStride<E>);
    tile_grads =
        memory.take<float>((n.window_tiles + 2 * n.global_tiles) * 2 * kTileKeys<E> * n.dim_padded);
    for (int64_t slot = 0; slot < n.window_slots + 2 * n.global_slots; ++slot)
      tiles.emplace_back(memory, n.dim_padded);
    held.resize(n.window_tiles);
  }

  static size_t bytes(const Sizes& n, const Rotary& rotary) {
    const int64_t block = int64_t{n.rows} * n.dim_padded;
    return TileRotation::bytes(rotary, kTileKeys<E>) + 2 * Scratch::bytes<E>(block) +
           2 * Scratch::bytes<E>(n.dim_padded * kColumnStride<E>) + Scratch::bytes<float>(block) +
           Scratch::bytes<GradRow>(n.rows) + 2 * Scratch::bytes<float>(kBlockRows<E> * kStripKeys) +
           Scratch::bytes<E>(kBlockRows<E> * kProbStride<E>) +
           2 * Scratch::bytes<E>(kTileKeys<E> / kLanes * kPanelStride<E>) +
           Scratch::bytes<E>(kTileKeys<E> * n.dim_padded) +
           Scratch::bytes<float>((kLanes + 1) * n.dim_padded) +
           2 * Scratch::bytes<float>(kMaxHeadsPerTask * kBiasStride<E>) +
           Scratch::bytes<float>((n.window_tiles + 2 * n.global_tiles) * 2 * kTileKeys<E> *
                                 n.dim_padded) +
           (n.window_slots + 2 * n.global_slots) * GradTile<E>::bytes(n.dim_padded);
  }

  Sizes sizes;
  Scratch memory;
  TileRotation rotation;
  E* queries;                      // [rows][Dp] in the frame of the branch at hand
  E* grads;                        // [rows][Dp] dO
  E* query_columns;                // [Dp][kColumnStride]
  E* grad_columns;                 // [Dp][kColumnStride]
  float* query_grads;              // [rows][Dp]
  GradRow* row_state;              // [rows]
  float* scores;                   // [kBlockRows][kStripKeys]
  float* grad_probs;               // [kBlockRows][kStripKeys] dO Vᵀ
  E* score_grads;                  // [kBlockRows][kProbStride] dS
  E* prob_panels;                  // P, see pack.h
  E* grad_panels;                  // dS
  E* rows;                         // [kTileKeys][Dp] on their way into a tile
  float* float_rows;               // [kLanes + 1][Dp]
  float* biases;                   // [heads of a task][kBiasStride]
  float* bias_grads;               // the same
  float* tile_grads;               // [tiles][dKᵀ, dVᵀ][Dp][kTileKeys]
  std::vector<GradTile<E>> tiles;  // packed: of the window, the near and the far branch
  std::vector<int64_t> held;       // by index % window_tiles: whose gradients stand there; -1: none
};
