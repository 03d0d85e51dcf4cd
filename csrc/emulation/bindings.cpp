// The CUDA kernels without a GPU as a Python module, for tests only: as C++ in the emulation
// (LMINF_EMULATION), as PTX in csrc/ptx_interpreter otherwise. A function takes one dict: tensors
// by the names of csrc/params.h (anything with torch's data_ptr, shape, stride and element_size),
// numbers by theirs. Every tensor is registered, so that an access outside all of them is a fault.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/launchers.h"
#include "../params.h"
#if defined(LMINF_EMULATION)
#include "runtime.h"
namespace machine = lminf::emulation;
#else
#include "../ptx_interpreter/control.h"
namespace machine = lminf::interpreter;
#endif

namespace py = pybind11;

namespace lminf::bindings {
namespace {

// What plans are made for.
cuda::DeviceFacts device_facts() {
#if defined(LMINF_EMULATION)
  return cuda::device_facts(0);
#else
  return cuda::device_facts(machine::current_device());
#endif
}

constexpr size_t kAlignment = 256;

class Arguments {
 public:
  explicit Arguments(py::dict values) : values_(std::move(values)) { machine::clear_globals(); }
  ~Arguments() { machine::clear_globals(); }

  bool has(const char* name) const { return values_.contains(name) && !values_[name].is_none(); }

  template <typename T>
  T number(const char* name) const {
    return values_[name].cast<T>();
  }

  // The tensor's memory, null for None.
  void* pointer(const char* name) const {
    if (!has(name)) return nullptr;
    const py::object tensor = values_[name];
    const auto address = tensor.attr("data_ptr")().cast<uintptr_t>();
    const auto shape = tensor.attr("shape").cast<std::vector<int64_t>>();
    const auto stride = tensor.attr("stride")().cast<std::vector<int64_t>>();
    int64_t elements = 1;
    for (size_t i = 0; i < shape.size(); ++i) {
      if (shape[i] == 0) return nullptr;
      elements += (shape[i] - 1) * stride[i];
    }
    void* memory = reinterpret_cast<void*>(address);
    machine::register_global(memory, elements * tensor.attr("element_size")().cast<int64_t>(),
                             name);
    return memory;
  }

  Strides strides(const char* name) const {
    if (!has(name)) return {};
    const auto s = values_[name].attr("stride")().cast<std::vector<int64_t>>();
    return {s[0], s[1], s[2]};
  }

  DType dtype(const char* name) const {
    const std::string type = py::str(values_[name].attr("dtype"));
    if (type == "torch.float32") return DType::kFloat32;
    if (type == "torch.bfloat16") return DType::kBFloat16;
    if (type == "torch.float16") return DType::kFloat16;
    throw std::invalid_argument(std::string(name) + " has dtype " + type);
  }

  RopeParams rope() const {
    RopeParams r;
    if (!has("inv_freq")) return r;
    r.inv_freq = pointer("inv_freq");
    r.inv_freq_is_double = values_["inv_freq"].attr("element_size")().cast<int>() == 8;
    r.interleaved = number<bool>("rope_interleaved");
    r.rotary_dim = 2 * values_["inv_freq"].attr("shape").cast<std::vector<int32_t>>()[0];
    r.scaling = number<float>("rope_scaling");
    return r;
  }

  ScoreParams score() const {
    ScoreParams s;
    s.scale = number<float>("scale");
    s.softcap = number<float>("softcap");
    s.alibi_slopes = static_cast<const float*>(pointer("alibi_slopes"));
    s.sink_logits = static_cast<const float*>(pointer("sink_logits"));
    s.distance_bias = static_cast<const float*>(pointer("distance_bias"));
    if (has("distance_bias"))
      s.n_distances = values_["distance_bias"].attr("shape").cast<std::vector<int64_t>>()[1];
    return s;
  }

 private:
  py::dict values_;
};

// Device memory that holds NaN until it is written.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : memory_(bytes + kAlignment, 0xFF) {
    const auto at = reinterpret_cast<uintptr_t>(memory_.data());
    begin_ = memory_.data() + (kAlignment - at % kAlignment) % kAlignment;
    machine::register_global(begin_, bytes, "workspace");
  }
  void* data() { return begin_; }

 private:
  std::vector<unsigned char> memory_;
  unsigned char* begin_;
};

LambdaAttnParams attn_params(const Arguments& a) {
  LambdaAttnParams p;
  p.dtype = a.dtype("q");
  p.q = a.pointer("q");
  p.k = a.pointer("k");
  p.v = a.pointer("v");
  p.global_k = a.pointer("global_k");
  p.global_v = a.pointer("global_v");
  p.out = a.pointer("out");
  p.lse = static_cast<float*>(a.pointer("lse"));
  p.q_stride = a.strides("q");
  p.k_stride = a.strides("k");
  p.v_stride = a.strides("v");
  p.global_k_stride = a.strides("global_k");
  p.global_v_stride = a.strides("global_v");
  p.out_stride = a.strides("out");
  p.k_start = static_cast<const int64_t*>(a.pointer("k_start"));
  p.cu_seqlens = static_cast<const int32_t*>(a.pointer("cu_seqlens"));
  p.n_sequences = a.number<int64_t>("n_sequences");
  p.batch = a.number<int64_t>("batch");
  p.heads_q = a.number<int64_t>("heads_q");
  p.heads_kv = a.number<int64_t>("heads_kv");
  p.seqlen_q = a.number<int64_t>("seqlen_q");
  p.seqlen_k = a.number<int64_t>("seqlen_k");
  p.head_dim = a.number<int64_t>("head_dim");
  p.n_global = a.number<int64_t>("n_global");
  p.window = a.number<int64_t>("window");
  p.max_distance = a.number<int64_t>("max_distance");
  p.k_rotated = a.number<int64_t>("k_rotated");
  p.rope = a.rope();
  p.score = a.score();
  return p;
}

LambdaDecodeParams decode_params(const Arguments& a) {
  LambdaDecodeParams p;
  p.dtype = a.dtype("q");
  p.q = a.pointer("q");
  p.k = a.pointer("k");
  p.v = a.pointer("v");
  p.ring_k = a.pointer("ring_k");
  p.ring_v = a.pointer("ring_v");
  p.global_k = a.pointer("global_k");
  p.global_v = a.pointer("global_v");
  p.out = a.pointer("out");
  p.lse = static_cast<float*>(a.pointer("lse"));
  p.q_stride = a.strides("q");
  p.k_stride = a.strides("k");
  p.v_stride = a.strides("v");
  p.ring_k_stride = a.strides("ring_k");
  p.ring_v_stride = a.strides("ring_v");
  p.global_k_stride = a.strides("global_k");
  p.global_v_stride = a.strides("global_v");
  p.out_stride = a.strides("out");
  p.positions = static_cast<const int64_t*>(a.pointer("positions"));
  p.batch = a.number<int64_t>("batch");
  p.heads_q = a.number<int64_t>("heads_q");
  p.heads_kv = a.number<int64_t>("heads_kv");
  p.head_dim = a.number<int64_t>("head_dim");
  p.capacity = a.number<int64_t>("capacity");
  p.n_global = a.number<int64_t>("n_global");
  p.window = a.number<int64_t>("window");
  p.max_distance = a.number<int64_t>("max_distance");
  p.rope = a.rope();
  p.score = a.score();
  return p;
}

void lambda_attn(const py::dict& values) {
  const Arguments a(values);
  const LambdaAttnParams p = attn_params(a);
  const cuda::DeviceFacts device = device_facts();
  Workspace workspace(cuda::lambda_attn_plan(p, device).workspace_bytes);
  cuda::lambda_attn(p, device, workspace.data(), nullptr);
}

void lambda_decode(const py::dict& values) {
  const Arguments a(values);
  const LambdaDecodeParams p = decode_params(a);
  const cuda::DeviceFacts device = device_facts();
  Workspace workspace(cuda::lambda_decode_plan(p, device).workspace_bytes);
  cuda::lambda_decode(p, device, workspace.data(), nullptr);
}

void clamped_rope(const py::dict& values) {
  const Arguments a(values);
  ClampedRopeParams p;
  p.dtype = a.dtype("x");
  p.x = a.pointer("x");
  p.out = a.pointer("out");
  p.x_stride = a.strides("x");
  p.out_stride = a.strides("out");
  p.position_ids = static_cast<const int64_t*>(a.pointer("position_ids"));
  p.position_batch_stride = a.number<int64_t>("position_batch_stride");
  p.batch = a.number<int64_t>("batch");
  p.heads = a.number<int64_t>("heads");
  p.seqlen = a.number<int64_t>("seqlen");
  p.head_dim = a.number<int64_t>("head_dim");
  p.has_max_position = a.has("max_position");
  if (p.has_max_position) p.max_position = a.number<int64_t>("max_position");
  p.rope = a.rope();
  cuda::clamped_rope(p, nullptr);
}

std::string attn_kernel(const py::dict& values) {
  const Arguments a(values);
  return cuda::name_of(cuda::lambda_attn_kernel(attn_params(a), device_facts()));
}

void middle_topk(const py::dict& values) {
  const Arguments a(values);
  MiddleTopkParams p;
  p.dtype = a.dtype("q");
  p.q = a.pointer("q");
  p.k = a.pointer("k");
  p.v = a.pointer("v");
  p.lambda_out = a.pointer("lambda_out");
  p.lambda_lse = static_cast<const float*>(a.pointer("lambda_lse"));
  p.out = a.pointer("out");
  p.lse = static_cast<float*>(a.pointer("lse"));
  p.chosen = static_cast<int64_t*>(a.pointer("chosen"));
  p.q_stride = a.strides("q");
  p.k_stride = a.strides("k");
  p.v_stride = a.strides("v");
  p.lambda_out_stride = a.strides("lambda_out");
  p.out_stride = a.strides("out");
  p.positions = static_cast<const int64_t*>(a.pointer("positions"));
  p.k_start = static_cast<const int64_t*>(a.pointer("k_start"));
  p.batch = a.number<int64_t>("batch");
  p.heads_q = a.number<int64_t>("heads_q");
  p.heads_kv = a.number<int64_t>("heads_kv");
  p.seqlen_k = a.number<int64_t>("seqlen_k");
  p.head_dim = a.number<int64_t>("head_dim");
  p.n_global = a.number<int64_t>("n_global");
  p.window = a.number<int64_t>("window");
  p.top_k = a.number<int64_t>("top_k");
  p.distance = a.number<int64_t>("distance");
  p.rope = a.rope();
  p.score = a.score();
  const cuda::DeviceFacts device = device_facts();
  Workspace workspace(cuda::middle_topk_plan(p, device).workspace_bytes);
  cuda::middle_topk(p, device, workspace.data(), nullptr);
}

}  // namespace
}  // namespace lminf::bindings

#if defined(LMINF_EMULATION)
PYBIND11_MODULE(lminf_emulated, m) {
#else
PYBIND11_MODULE(lminf_ptx, m) {
#endif
  using namespace lminf::bindings;
  using machine::Device;
  m.doc() = "The CUDA kernels, run on the CPU";
  m.def("set_schedule_seed", &machine::set_schedule_seed, py::arg("seed"));
  m.def("lambda_attn", &lambda_attn);
  m.def("lambda_decode", &lambda_decode);
  m.def("clamped_rope", &clamped_rope);
  m.def("attn_kernel", &attn_kernel);
  m.def("middle_topk", &middle_topk);
  m.def(
      "set_device",
      [](int capability, int multiprocessors, bool has_sm90a, bool has_sm90) {
        machine::set_device({capability, multiprocessors, has_sm90a, has_sm90});
      },
      py::arg("capability") = Device().capability,
      py::arg("multiprocessors") = Device().multiprocessors,
      py::arg("has_sm90a") = Device().has_sm90a, py::arg("has_sm90") = Device().has_sm90);
  m.def(
      "take_launches",
      [] {
        py::list all;
        for (const machine::LaunchRecord& launch : machine::take_launches()) {
          py::dict one(py::arg("kernel") = launch.kernel, py::arg("overlaps") = launch.overlaps,
                       py::arg("blocks") = launch.blocks, py::arg("triggered") = launch.triggered);
#if !defined(LMINF_EMULATION)
          one["name"] = launch.name;
          one["target"] = launch.target;
          one["instructions"] = launch.instructions;
#endif
          all.append(one);
        }
        return all;
      },
      "The launches since the last call of this.");
#if !defined(LMINF_EMULATION)
  m.def(
      "kernel_texts",
      [] {
        py::list all;
        for (const machine::KernelText& text : machine::kernel_texts()) {
          all.append(py::make_tuple(text.target, text.name, text.body));
        }
        return all;
      },
      "Of every kernel in the build: target, name as in the PTX, body.");
  m.def(
      "replace_kernel_text",
      [](const std::string& target, const std::string& name, const std::string& body) {
        machine::replace_kernel_text({target, name, body});
      },
      "Another body for a kernel, until restore_kernel_texts.");
  m.def("restore_kernel_texts", &machine::restore_kernel_texts);
  m.def("decode_all", &machine::decode_all, "Raises at the first instruction that is not known.");
  m.def("forget_context", &machine::forget_context, "As on a thread before its first CUDA work.");
  m.def("refuse_tensor_maps", &machine::refuse_tensor_maps, py::arg("calls"), py::arg("after"));
  m.def("hide_entry_points", &machine::hide_entry_points, py::arg("calls"));
#endif
}
