// Prefill forward for Hopper (wgmma, TMA, sm_90a).
//
//   out = softmax over the visible keys of score(<R(min(i - j, L)) q_i, k_j>) v_j,
//   L = max_distance
//
// Schedule of a tile of queries, the same branches in the same order as prefill/sm80.cuh:
//   1. far keys (global, at distance >= L), 16 at a time: raw Q against keys rotated by -L;
//   2. each consumer rotates its own 64 rows of Q in place;
//   3. near keys (global, window <= distance < L; empty when L == window), 16 at a time;
//   4. window keys, kBlockN at a time: masked at the two edges, bare in between. The product of a
//      tile with Q is under way together with the product of the weights before it with their
//      values; the softmax of the tile overlaps the latter, and the other consumer's products: the
//      two take turns at the tensor cores.
// A block is there for as many tiles of queries as it takes (grid = multiprocessors). Its first
// warpgroup loads: one warp works out what a tile of queries meets and keeps TMA copies under way,
// another stores what is done. Nothing else waits for global memory. Everything is handed over by
// mbarriers:
//   q_full     walk and queries of a slot have come          producer -> consumers
//   out_ready  the slot's queries have become its outputs    consumers -> storing warp
//   q_empty    they are stored                               storing warp -> producer
//   k_full, k_empty, v_full, v_empty   the same of the ring of keys and the ring of values
// Weights never leave registers. Scores live in base 2, the scale folded into the exponent's fma.
#pragma once

#include "../common/shared_tile.cuh"
#include "../common/softmax.cuh"
#include "../ptx/sm90.cuh"
#include "launch.h"
#include "rows.cuh"
#include "sm90_tiles.h"

namespace lminf::cuda {

// --- Traits ---

constexpr int kWarpgroup = 128;     // threads
constexpr int kWarpgroupRows = 64;  // of a wgmma

// Rows of kDim elements as TMA lays them down: panels of 64 columns, 128 bytes a row, whose eight
// 16-byte chunks trade places by row. Starts at a multiple of 1024 bytes.
template <typename T, int kRows_, int kDim_>
class PanelTile {
 public:
  using Element = T;
  static constexpr int kRows = kRows_;
  static constexpr int kPanels = kDim_ / kPanel;
  static constexpr int kRowBytes = kPanel * static_cast<int>(sizeof(T));
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;

  LMINF_DEVICE explicit PanelTile(int start) : start_(start) {}

  // Shared address of a row's beginning in a panel; `row` is a multiple of 8.
  LMINF_DEVICE uint32_t address(int row = 0, int panel = 0) const {
    return shared_address(shared_memory()) +
           static_cast<uint32_t>(start_ + panel * kPanelBytes + row * kRowBytes);
  }

  LMINF_DEVICE T& element(int row, int dim) const {
#if defined(LMINF_EMULATION)
    if (row < 0 || row >= kRows) emulation::index_fault("tile row", row, kRows);
    if (dim < 0 || dim >= kDim_) emulation::index_fault("tile column", dim, kDim_);
#endif
    const int chunk = dim % kPanel / kChunkElements<T>;
    unsigned char* from = shared_memory() + start_ + dim / kPanel * kPanelBytes + row * kRowBytes +
                          (chunk ^ (row & 7)) * 16;
    return reinterpret_cast<T*>(from)[dim % kChunkElements<T>];
  }
  // Two neighbours, the first at an even dim.
  LMINF_DEVICE uint32_t& pair(int row, int dim) const {
    return *reinterpret_cast<uint32_t*>(&element(row, dim));
  }

 private:
  int start_;
};

template <typename T, int kHeadDim_>
struct Sm90Traits {
  using Element = T;
  static constexpr Sm90Tiles kTiles = sm90_tiles(kHeadDim_);
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = kTiles.block_m;
  static constexpr int kBlockN = kTiles.block_n;
  static constexpr int kStages = kTiles.stages;
  static constexpr int kQSlots = kTiles.q_slots;
  using QTile = PanelTile<T, kBlockM, kHeadDim>;
  using KeyTile = PanelTile<T, kBlockN, kHeadDim>;
  using GlobalTile = PanelTile<T, kGlobalN, kHeadDim>;  // stands in a KeyTile's place

  // Shared memory, from its start: Q slots, K ring, V ring, walks, barriers.
  static constexpr int kKStart = kQSlots * QTile::kBytes;
  static constexpr int kVStart = kKStart + kStages * KeyTile::kBytes;
  static constexpr int kWalkStart = kVStart + kStages * KeyTile::kBytes;
  static constexpr int kBarrierStart = kWalkStart + kQSlots * kWalkBytes;
  static constexpr int kSharedBytes = sm90_shared_bytes(kTiles);

  static_assert(kTiles.head_dim == kHeadDim, "a kernel of its own");
  static_assert(kBlockM == kSm90Consumers * kWarpgroupRows, "a wgmma's rows for each consumer");
  static_assert(sizeof(BlockWalk<T>) <= kWalkBytes, "the walk fits");
  static_assert(kBarrierStart + 8 * (3 * kQSlots + 4 * kStages) <= kSharedBytes, "barriers fit");
};

// The first barrier of each kind; a kind has one for each slot or stage.
template <typename Traits>
struct Sm90Barriers {
  static constexpr int kQFull = Traits::kBarrierStart;
  static constexpr int kOutReady = kQFull + 8 * Traits::kQSlots;
  static constexpr int kQEmpty = kOutReady + 8 * Traits::kQSlots;
  static constexpr int kKFull = kQEmpty + 8 * Traits::kQSlots;
  static constexpr int kKEmpty = kKFull + 8 * Traits::kStages;
  static constexpr int kVFull = kKEmpty + 8 * Traits::kStages;
  static constexpr int kVEmpty = kVFull + 8 * Traits::kStages;

  LMINF_DEVICE static uint32_t at(int kind, int slot) {
    return shared_address(shared_memory()) + static_cast<uint32_t>(kind + 8 * slot);
  }
};

// Where a role stands in a ring. Fillers and users of a slot's n-th round wait for opposite
// parities: users for the round's filling, fillers for the round before to be over.
template <int kSlots>
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;
  LMINF_DEVICE void next() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Named barriers; 0 is __syncthreads.
constexpr int kOrderBarrier = 1;     // + consumer: its turn at the tensor cores
constexpr int kConsumerBarrier = 3;  // + consumer: its four warps

struct Sm90Arguments {
  TensorMap q, out;
  TensorMap k[kBranches], v[kBranches];
  AttnSources sources;
  int64_t works;  // tiles of queries, of all heads
};

// --- Scores and weights of one thread: two rows of its warp's sixteen ---

// Element 4n + 2r + e of an accumulator stands in row tile_row(r, lane) and column
// 8n + 2(lane % 4) + e.
using WgmmaRows = RowStates<2, 4>;

// Of a lane's columns of a row, 8n + first and the one after it for n = 0, 1, ..., those in a range
// of at most 128 columns, a bit each.
LMINF_DEVICE uint32_t own_columns(ColumnRange range, int first) {
  auto below = [&](int column) {
    const int past = column % 8 - first;
    const int own = column / 8 * 2 + (past <= 0 ? 0 : past == 1 ? 1 : 2);
    return own >= 32 ? ~0u : (1u << own) - 1;
  };
  return below(range.hi) & ~below(range.lo);
}

// Softcap, ALiBi, mask.
template <int kKeys>
LMINF_DEVICE void finish_scores(float (&s)[kKeys / 2], const QueryRows<false>& rows, bool full,
                                int lane) {
  static_assert(kKeys <= 128, "a bit for each of a lane's columns of a row");
  lane = recomputed(lane);
  if (!rows.scoring().only_scales()) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      const int r = i / 2 % 2;
      s[i] = rows.score(s[i], r, tile_row(r, lane), i / 4 * 8 + 2 * (lane % 4) + i % 2);
    }
  }
  if (!full) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t seen = own_columns(rows.columns(tile_row(r, lane)), 2 * (lane % 4));
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) {
        if ((seen >> i & 1) == 0) s[i / 2 * 4 + 2 * r + i % 2] = minus_infinity();
      }
    }
  }
}

// Scores become weights; `factor` and the answer as to_weights has them.
template <int kKeys>
LMINF_DEVICE bool to_weights(float (&s)[kKeys / 2], WgmmaRows& state, float unit,
                             float (&factor)[2]) {
  return to_weights<kKeys / 4>([&](int r, int n) -> float& { return s[n / 2 * 4 + 2 * r + n % 2]; },
                               state, unit, factor);
}

template <int kCount>
LMINF_DEVICE void rescale(float (&out)[kCount], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] *= factor[i / 2 % 2];
}

// An accumulator's pairs are a register operand's: no lane gives another anything.
template <typename T, int kSteps>
LMINF_DEVICE void pack_weights(const float (&s)[8 * kSteps], uint32_t (&weights)[kSteps][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kSteps; ++i) weights[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
}

// --- Kernel ---

template <typename Traits>
__global__ void __launch_bounds__(kSm90Threads, 1)
    lambda_attn_sm90_kernel(const __grid_constant__ Sm90Arguments arguments) {
#if LMINF_SM90A
  using T = typename Traits::Element;
  using QTile = typename Traits::QTile;
  using KeyTile = typename Traits::KeyTile;
  using GlobalTile = typename Traits::GlobalTile;
  using Barriers = Sm90Barriers<Traits>;
  constexpr int kHeadDim = Traits::kHeadDim;
  constexpr int kBlockN = Traits::kBlockN;
  constexpr int kPanels = QTile::kPanels;
  const AttnSources& sources = arguments.sources;
  const LambdaAttnParams& p = sources.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = ptx::warp_index();

  // --- Shared memory ---
  auto q_slot = [](int slot) { return QTile(slot * QTile::kBytes); };
  auto k_start = [](int stage) { return Traits::kKStart + stage * KeyTile::kBytes; };
  auto v_start = [](int stage) { return Traits::kVStart + stage * KeyTile::kBytes; };
  auto walk_slot = [](int slot) -> BlockWalk<T>& {
    return SharedArray<BlockWalk<T>>(shared_memory() + Traits::kWalkStart + slot * kWalkBytes,
                                     1)[0];
  };
  RingPlace<Traits::kQSlots> q_place;
  RingPlace<Traits::kStages> k_place, v_place;

  // --- Barriers ---
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < Traits::kQSlots; ++slot) {
      ptx::mbarrier_init(Barriers::at(Barriers::kQFull, slot), 1);
      ptx::mbarrier_init(Barriers::at(Barriers::kOutReady, slot), 4 * kSm90Consumers);
      ptx::mbarrier_init(Barriers::at(Barriers::kQEmpty, slot), 1);
    }
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      ptx::mbarrier_init(Barriers::at(Barriers::kKFull, stage), 1);
      ptx::mbarrier_init(Barriers::at(Barriers::kKEmpty, stage), 4 * kSm90Consumers);
      ptx::mbarrier_init(Barriers::at(Barriers::kVFull, stage), 1);
      ptx::mbarrier_init(Barriers::at(Barriers::kVEmpty, stage), 4 * kSm90Consumers);
    }
    ptx::fence_barrier_init();
    for (const TensorMap* map : {&arguments.q, &arguments.k[kWindow], &arguments.v[kWindow]}) {
      ptx::tma_prefetch_map(*map);
    }
  }
  __syncthreads();

  if (warp < 4) {
    ptx::registers_decrease<kSm90ProducerRegisters>();
    if (warp == 0) {
      // --- Loads: walk and Q of a tile, then its keys, their values one tile behind them ---
      for (int64_t work = blockIdx.x; work < arguments.works; work += gridDim.x, q_place.next()) {
        BlockWalk<T>& block = walk_slot(q_place.slot);
        if (lane == 0) {
          ptx::mbarrier_wait(Barriers::at(Barriers::kQEmpty, q_place.slot), q_place.parity ^ 1);
        }
        block.fill(sources, work, Traits::kBlockM, kGlobalN, kBlockN, lane);
        if (lane != 0) continue;

        const int batch = static_cast<int>(block.tile.batch);
        const int kv_head = static_cast<int>(block.tile.kv_head);
        const uint32_t q_full = Barriers::at(Barriers::kQFull, q_place.slot);
        ptx::mbarrier_arrive_expect_tx(q_full, QTile::kBytes);
        for (int panel = 0; panel < kPanels; ++panel) {
          ptx::tma_load_4d(q_slot(q_place.slot).address(0, panel), arguments.q, q_full,
                           panel * kPanel, static_cast<int>(block.tile.first_row),
                           static_cast<int>(block.tile.head), batch);
        }

        // Keys or values of a visit into the next place of their ring.
        auto load = [&](const TensorMap(&maps)[kBranches], auto& place, int visit, int ring_start,
                        int kind_empty, int kind_full, int64_t BranchKeys<T>::* row_origin) {
          const int branch = block.visits.branch(visit);
          const BranchKeys<T>& keys = block.branches[branch];
          const int row = static_cast<int>(keys.position(block.tile_of(visit)) - keys.*row_origin);
          const int panel_bytes =
              branch == kWindow ? KeyTile::kPanelBytes : GlobalTile::kPanelBytes;
          const uint32_t target = shared_address(shared_memory()) +
                                  static_cast<uint32_t>(ring_start + place.slot * KeyTile::kBytes);
          const uint32_t full = Barriers::at(kind_full, place.slot);
          ptx::mbarrier_wait(Barriers::at(kind_empty, place.slot), place.parity ^ 1);
          ptx::mbarrier_arrive_expect_tx(full, kPanels * panel_bytes);
          for (int panel = 0; panel < kPanels; ++panel) {
            ptx::tma_load_4d(target + panel * panel_bytes, maps[branch], full, panel * kPanel, row,
                             kv_head, batch);
          }
          place.next();
        };
        for (int visit = 0; visit <= block.visits.end; ++visit) {
          if (visit < block.visits.end) {
            load(arguments.k, k_place, visit, Traits::kKStart, Barriers::kKEmpty, Barriers::kKFull,
                 &BranchKeys<T>::k_origin);
          }
          if (visit > 0) {
            load(arguments.v, v_place, visit - 1, Traits::kVStart, Barriers::kVEmpty,
                 Barriers::kVFull, &BranchKeys<T>::v_origin);
          }
        }
      }
    } else if (warp == 1 && lane == 0) {
      // --- Stores: a slot's outputs, then the slot is free ---
      for (int64_t work = blockIdx.x; work < arguments.works; work += gridDim.x, q_place.next()) {
        ptx::mbarrier_wait(Barriers::at(Barriers::kOutReady, q_place.slot), q_place.parity);
        const QueryTile& tile = walk_slot(q_place.slot).tile;
        for (int panel = 0; panel < kPanels; ++panel) {
          ptx::tma_store_4d(arguments.out, q_slot(q_place.slot).address(0, panel), panel * kPanel,
                            static_cast<int>(tile.first_row), static_cast<int>(tile.head),
                            static_cast<int>(tile.batch));
        }
        ptx::tma_store_commit();
        ptx::tma_store_wait_read<0>();
        ptx::mbarrier_arrive(Barriers::at(Barriers::kQEmpty, q_place.slot));
      }
    }
  } else {
    ptx::registers_increase<kSm90ConsumerRegisters>();
    const int consumer = warp / 4 - 1;
    const int group_row = consumer * kWarpgroupRows;
    const int warp_row = group_row + warp % 4 * 16;
    const Scoring scoring(p.score);
    auto sync_group = [&] { ptx::named_barrier(kConsumerBarrier + consumer, kWarpgroup); };
    // The last instruction of a warp on something is done: one arrival for it.
    auto arrive = [&](uint32_t barrier) {
      if (lane == 0) ptx::mbarrier_arrive(barrier);
    };

    if (consumer == 1) ptx::named_barrier_arrive(kOrderBarrier, kSm90Consumers * kWarpgroup);

    for (int64_t work = blockIdx.x; work < arguments.works; work += gridDim.x, q_place.next()) {
      ptx::mbarrier_wait(Barriers::at(Barriers::kQFull, q_place.slot), q_place.parity);
      const QTile q_tile = q_slot(q_place.slot);
      const BlockWalk<T>& block = walk_slot(q_place.slot);
      const float slope = alibi_slope(p.score, block.tile.head);
      float out[kHeadDim / 2];
      WgmmaRows state;
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0.0f;

      auto rows_against = [&](const BranchKeys<T>& keys, int64_t index, int n_keys) {
        return QueryRows<false>{p.score,
                                block.tile.head,
                                slope,
                                keys.branch,
                                block.tile.positions.lo + recomputed(warp_row),
                                keys.position(index),
                                p.max_distance,
                                n_keys};
      };
      // scores = Q K^T over the first keys of a K stage, issued.
      auto issue_scores = [&](auto tile, auto& scores) {
        using Tile = decltype(tile);
        const auto a =
            ptx::k_major_descriptor<Swizzle::k128>(q_tile.address(recomputed(group_row)));
        const auto b = ptx::k_major_descriptor<Swizzle::k128>(tile.address());
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; ++step) {
          constexpr int kSteps = kPanel / 16;
          const int panel = step / kSteps, in_panel = step % kSteps * 32;
          ptx::wgmma<T, ptx::Major::kK, ptx::Major::kK>(
              scores, a.plus(panel * QTile::kPanelBytes + in_panel),
              b.plus(panel * Tile::kPanelBytes + in_panel), step > 0);
        }
        static_assert(sizeof(scores) == Tile::kRows / 2 * sizeof(float), "a tile's scores");
        ptx::wgmma_commit();
      };
      // out += weights V, issued.
      auto issue_values = [&](auto tile, const auto& weights) {
        using Tile = decltype(tile);
        const auto b = ptx::mn_major_descriptor<Swizzle::k128>(tile.address(), Tile::kPanelBytes);
#pragma unroll
        for (int step = 0; step < Tile::kRows / 16; ++step) {
          ptx::wgmma<T, ptx::Major::kMN>(out, weights[step], b.plus(step * 16 * Tile::kRowBytes),
                                         true);
        }
        ptx::wgmma_commit();
      };

      auto await_keys = [&] {
        ptx::mbarrier_wait(Barriers::at(Barriers::kKFull, k_place.slot), k_place.parity);
      };
      auto release_keys = [&] {
        arrive(Barriers::at(Barriers::kKEmpty, k_place.slot));
        k_place.next();
      };
      auto await_values = [&] {
        ptx::mbarrier_wait(Barriers::at(Barriers::kVFull, v_place.slot), v_place.parity);
      };
      auto release_values = [&] {
        arrive(Barriers::at(Barriers::kVEmpty, v_place.slot));
        v_place.next();
      };

      // --- Far and near tiles: a few keys, one step after the other ---
      auto meet_globals = [&](int branch) {
        const BranchKeys<T>& keys = block.branches[branch];
        for (int64_t index = keys.tiles.begin; index < keys.tiles.end; ++index) {
          float scores[kGlobalN / 2];
          await_keys();
          ptx::wgmma_fence();
          issue_scores(GlobalTile(k_start(k_place.slot)), scores);
          ptx::wgmma_wait<0>(scores);
          release_keys();

          finish_scores<kGlobalN>(scores, rows_against(keys, index, kGlobalN),
                                  keys.tiles.full(index), lane);
          float factor[2];
          if (to_weights<kGlobalN>(scores, state, scoring.exponent_unit(), factor)) {
            rescale(out, factor);
          }
          uint32_t weights[1][4];
          pack_weights<T>(scores, weights);

          await_values();
          ptx::wgmma_fence();
          issue_values(GlobalTile(v_start(v_place.slot)), weights);
          ptx::wgmma_wait<0>(out);
          release_values();
        }
      };
      meet_globals(kFar);
      if (p.rope.rotary_dim > 0) {
        sync_group();  // all four warps' products with raw rows are done
        rotate_tile_rows(q_tile, p.rope, warp_row, 16, block.tile.positions.lo + warp_row,
                         -kUnbounded, lane);
        ptx::fence_proxy_async();
        sync_group();
      }
      meet_globals(kNear);

      // --- Window tiles: Q K^T of one is under way beside weights V of the one before ---
      const BranchKeys<T>& window = block.branches[kWindow];
      if (window.tiles.begin < window.tiles.end) {
        float scores[kBlockN / 2], factor[2];
        uint32_t weights[kBlockN / 16][4];
        auto finish_tile = [&](int64_t index) {
          finish_scores<kBlockN>(scores, rows_against(window, index, kBlockN),
                                 window.tiles.full(index), lane);
          return to_weights<kBlockN>(scores, state, scoring.exponent_unit(), factor);
        };

        await_keys();
        ptx::wgmma_fence();
        issue_scores(KeyTile(k_start(k_place.slot)), scores);
        ptx::wgmma_wait<0>(scores);
        release_keys();
        if (finish_tile(window.tiles.begin)) rescale(out, factor);
        pack_weights<T>(scores, weights);
        if (window.tiles.begin + 1 < window.tiles.end) await_keys();

        for (int64_t index = window.tiles.begin + 1; index < window.tiles.end; ++index) {
          ptx::named_barrier(kOrderBarrier + consumer, kSm90Consumers * kWarpgroup);
          ptx::wgmma_fence();
          issue_scores(KeyTile(k_start(k_place.slot)), scores);
          await_values();
          ptx::wgmma_fence();
          issue_values(KeyTile(v_start(v_place.slot)), weights);
          ptx::named_barrier_arrive(kOrderBarrier + 1 - consumer, kSm90Consumers * kWarpgroup);

          ptx::wgmma_wait<1>(scores);
          release_keys();
          const bool changed = finish_tile(index);
          // ptxas moves the wait for the values up to the last branch, and the softmax would no
          // longer run beside their product. So the branch of another wait comes between the two.
          if (index + 1 < window.tiles.end) await_keys();
          ptx::wgmma_wait<0>(out);
          release_values();
          if (changed) rescale(out, factor);
          pack_weights<T>(scores, weights);
        }

        await_values();
        ptx::wgmma_fence();
        issue_values(KeyTile(v_start(v_place.slot)), weights);
        ptx::wgmma_wait<0>(out);
        release_values();
      }

      // --- Normalise; out takes Q's place and is stored from there, lse directly ---
      const Sink sink(p.score, block.tile.head);
      const int own_lane = recomputed(lane);
      sync_group();  // all four warps' products with these rows are done
#pragma unroll
      for (int r = 0; r < WgmmaRows::kRows; ++r) {
        const SoftmaxEnd end = sink.finish(state.row(r));
        const int row = recomputed(warp_row) + tile_row(r, own_lane);
        if (own_lane % 4 == 0 && row < block.tile.rows) {
          store_global(p.lse + (block.tile.batch * p.heads_q + block.tile.head) * p.seqlen_q +
                           block.tile.first_row + row,
                       end.lse);
        }
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          q_tile.pair(row, 8 * n + 2 * (own_lane % 4)) =
              pack<T>(out[4 * n + 2 * r] * end.out_scale, out[4 * n + 2 * r + 1] * end.out_scale);
        }
      }
      ptx::fence_proxy_async();
      __syncwarp();
      arrive(Barriers::at(Barriers::kOutReady, q_place.slot));
    }
    if (consumer == 0) ptx::named_barrier(kOrderBarrier, kSm90Consumers * kWarpgroup);
  }
#else
  __trap();
#endif
}

// --- Launcher ---

// False, and nothing is launched, where the driver refuses to map a tensor.
template <typename T, int kHeadDim>
bool run_lambda_attn_sm90(AttnSources sources, int multiprocessors, Stream stream) {
  using Traits = Sm90Traits<T, kHeadDim>;
  const LambdaAttnParams& p = sources.p;
  sources.query_tiles = query_tiles(p, Traits::kBlockM);
  auto map = [&](const void* data, const Strides& stride, int64_t heads, int64_t rows,
                 int box_rows) {
    return encode_tensor_map(
        sm90_map_shape(data, stride, p.batch, heads, rows, p.head_dim, box_rows));
  };
  Sm90Arguments arguments;
  try {
    arguments.q = map(p.q, p.q_stride, p.heads_q, p.seqlen_q, Traits::kBlockM);
    arguments.out = map(p.out, p.out_stride, p.heads_q, p.seqlen_q, Traits::kBlockM);
    for (int branch = kWindow; branch >= kFar; --branch) {
      const KeyTensor& k = sources.k[branch];
      const bool own = own_globals(p) && branch != kWindow;
      const int box_rows = branch == kWindow ? Traits::kBlockN : kGlobalN;
      // A branch without keys leaves its maps unread; what stands there then need not fit TMA.
      if (!sources.ready[branch]) {
        arguments.k[branch] = arguments.k[kWindow];
        arguments.v[branch] = arguments.v[kWindow];
        continue;
      }
      arguments.k[branch] = map(k.data, k.stride, p.heads_kv, k.rows, box_rows);
      arguments.v[branch] =
          own ? map(p.global_v, p.global_v_stride, p.heads_kv, p.n_global, box_rows)
              : map(p.v, p.v_stride, p.heads_kv, p.seqlen_k, box_rows);
    }
  } catch (const TensorMapRefused&) {
    return false;
  }
  arguments.sources = sources;
  arguments.works = sources.query_tiles * p.heads_q * p.batch;
  launch("lambda_attn_sm90", lambda_attn_sm90_kernel<Traits>,
         {min64(arguments.works, multiprocessors), kSm90Threads, Traits::kSharedBytes}, stream,
         arguments);
  return true;
}

// A head dim without a kernel of its own runs in the next larger one, its missing columns zero.
template <typename T>
bool run_lambda_attn_sm90(const AttnSources& sources, int multiprocessors, Stream stream) {
  switch (sm90_tiles(sources.p.head_dim).head_dim) {
    case 64:
      return run_lambda_attn_sm90<T, 64>(sources, multiprocessors, stream);
    case 128:
      return run_lambda_attn_sm90<T, 128>(sources, multiprocessors, stream);
    case 256:
      return run_lambda_attn_sm90<T, 256>(sources, multiprocessors, stream);
  }
  throw std::invalid_argument("lambda_attn: head dim " + std::to_string(sources.p.head_dim) +
                              " on Hopper, but at most 256 is built");
}

}  // namespace lminf::cuda
