// From a row's scores to its probabilities and to the gradient of its products.
// Included inside namespace lminf::cpu::LMINF_ISA.
//
// With P = exp(s - lse) over the visible keys: dS = P ∘ (dO Vᵀ - δ), and through the softcap
// (1 - (s / c)²). A sink logit shrinks the outputs of a row by w = exp(lse - lse'), where lse' has
// the sink too; dO and δ come in with w in them, and δ less the gradient of lse.

// What a row brings along.
struct GradRow {
  float lse;    // in units of log2; +inf: the row sees nothing
  float delta;  // w rowsum(dO ∘ O) - dlse
};

// Columns [0, n) of a strip, of which the row sees [lo, hi): P and dS into their panels, from the
// panel of column 0 on, dS into its row too. `bias` takes dS up by column; null: there is no bias.
template <bool kAllVisible, typename Scores, typename E>
inline void row_gradients(const Scores& scores, const ScoreMap& map, const GradRow& g, int row,
                          const float* products, const float* grad_probs, int lo, int hi, int n,
                          E* prob_panels, E* grad_panels, E* grads, float* bias) {
  const Vec lse = vset(g.lse), delta = vset(g.delta), none = vset(minus_infinity());
  const Vec one = vset(1.0f);
  for (int c = 0; c < n; c += kLanes) {
    Vec p, slope = one;
    if constexpr (Scores::kCapped) {
      const Vec s = scores(products, c);
      const Vec part = vmul(s, vset(1.0f / (map.softcap * kLog2e)));
      slope = vsub(one, vmin(vmul(part, part), one));
      p = vsub(s, lse);
    } else {
      p = scores.minus(lse, products, c);
    }
    if (!kAllVisible) p = vkeep(p, lo - c, hi - c, none);
    p = vexp2_for<E>(p);
    Vec ds = vmul(p, vsub(vload(grad_probs + c), delta));
    if constexpr (Scores::kCapped) ds = vmul(ds, slope);
    const int64_t panel = c / kLanes * kPanelStride<E>;
    store_in_panel(prob_panels + panel, row, p);
    store_in_panel(grad_panels + panel, row, ds);
    vstore(grads + c, ds);
    if (bias != nullptr) vstore(bias + c, vadd(vload(bias + c), ds));
  }
}
