// The arguments of an op, as PyTorch hands them over: on a stack, in the order of the op's schema.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

namespace lminf::binding {

using torch::stable::Tensor;

// A group of arguments (options.h).
template <typename T, typename = void>
struct IsGroup : std::false_type {};
template <typename T>
struct IsGroup<T, std::void_t<decltype(T::fields(std::declval<T&>()))>> : std::true_type {};

// Calls f for every tensor among the arguments.
template <typename T, typename F>
void each_tensor(const T& argument, F& f) {
  if constexpr (IsGroup<T>::value) {
    std::apply([&](const auto&... field) { (each_tensor(field, f), ...); }, T::fields(argument));
  } else if constexpr (std::is_same_v<T, std::optional<Tensor>>) {
    if (argument) f(*argument);
  } else if constexpr (std::is_same_v<T, Tensor>) {
    f(argument);
  }
}

template <typename... T, typename F>
void each_tensor(const std::tuple<T...>& arguments, F& f) {
  std::apply([&](const auto&... argument) { (each_tensor(argument, f), ...); }, arguments);
}

// Takes arguments off PyTorch's stack, in order.
class Stack {
 public:
  explicit Stack(const StableIValue* next) : next_(next) {}

  template <typename T>
  T take() {
    if constexpr (IsGroup<T>::value) {
      T group;
      std::apply([&](auto&... field) { ((field = take<std::decay_t<decltype(field)>>()), ...); },
                 T::fields(group));
      return group;
    } else {
      return torch::stable::detail::to<T>(*next_++);
    }
  }

  // How many of them make up a T.
  template <typename T>
  static constexpr uint64_t width() {
    if constexpr (IsGroup<T>::value) {
      return std::tuple_size_v<decltype(T::fields(std::declval<T&>()))>;
    } else {
      return 1;
    }
  }

 private:
  const StableIValue* next_;
};

}  // namespace lminf::binding
