// torch.ops.dpo_fast_sm90: checks that name what does not fit, and the current stream and device.
//
// Through torch's stable ABI as of 2.10, so that one build serves that version and later ones.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "linear_logp_sm90.h"

// Of the C shim, in torch built with CUDA. Weak, so that the library loads beside torch without
// CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(
    int32_t device_index, void** stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

std::string described(const Tensor& x) {
  std::ostringstream text;
  text << "sizes [";
  for (int64_t i = 0; i < x.dim(); ++i) text << (i ? ", " : "") << x.size(i);
  text << "], strides [";
  for (int64_t i = 0; i < x.dim(); ++i) text << (i ? ", " : "") << x.stride(i);
  text << "], dtype " << torch::headeronly::toString(x.scalar_type());
  return text.str();
}

// Elements from row to row. Torch may give a single row any stride.
int64_t row_stride(const Tensor& x) {
  return x.size(0) > 1 ? x.stride(0) : (x.size(1) + 7) / 8 * 8;
}

// [rows, columns] of bf16 as TMA can address it.
void check_matrix(const char* name, const Tensor& x, int64_t rows, int64_t columns) {
  const bool fits = x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16 && x.size(0) == rows &&
                    x.size(1) == columns && (columns == 1 || x.stride(1) == 1) &&
                    row_stride(x) % 8 == 0 && row_stride(x) >= columns &&
                    reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  STD_TORCH_CHECK(fits, name, ": expected bf16 [", rows, ", ", columns,
                  "], columns contiguous, rows at multiples of 16 bytes; got ", described(x),
                  ", address ", reinterpret_cast<uintptr_t>(x.data_ptr()));
}

void check_vector(const char* name, const Tensor& x, ScalarType dtype, std::vector<int64_t> sizes) {
  bool fits = x.scalar_type() == dtype && x.is_contiguous() &&
              x.dim() == static_cast<int64_t>(sizes.size());
  std::ostringstream wanted;
  for (size_t i = 0; i < sizes.size(); ++i) {
    fits = fits && x.size(i) == sizes[i];
    wanted << (i ? ", " : "") << sizes[i];
  }
  STD_TORCH_CHECK(fits, name, ": expected contiguous ", torch::headeronly::toString(dtype), " [",
                  wanted.str(), "]; got ", described(x));
}

void check_device(const char* name, const Tensor& x, const Tensor& hidden) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == hidden.get_device_index(), name,
                  " must be on the CUDA device of hidden; devices are ", x.get_device_index(),
                  " and ", hidden.get_device_index(), " (-1: a CPU)");
}

template <class T>
T* pointer(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}
template <class T>
T* pointer(const MaybeTensor& x) {
  return x.has_value() ? pointer<T>(*x) : nullptr;
}

dpo_fast::Operands operands(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                            double factor) {
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1),
                  "hidden and weight must be [T, D] and [V, D]; got ", described(hidden), " and ",
                  described(weight));
  const int64_t T = hidden.size(0), D = hidden.size(1), V = weight.size(0);
  const int64_t most = std::numeric_limits<int>::max() / 2;
  STD_TORCH_CHECK(T > 0 && V > 0 && D > 0 && T <= most && V <= most && D <= most,
                  "T, V and D must be in 1..", most, "; got ", T, ", ", V, ", ", D);
  const int64_t units = (T / dpo_fast::kBlockT + 1) * (V / dpo_fast::kBlockV + 1);
  STD_TORCH_CHECK(units <= most, "T=", T, " and V=", V, " make ", units, " tiles, more than ",
                  most);
  check_matrix("hidden", hidden, T, D);
  check_matrix("weight", weight, V, D);
  check_vector("targets", targets, ScalarType::Long, {T});
  return {hidden.data_ptr(),
          weight.data_ptr(),
          pointer<const int64_t>(targets),
          row_stride(hidden),
          row_stride(weight),
          static_cast<int>(T),
          static_cast<int>(V),
          static_cast<int>(D),
          {static_cast<float>(std::fabs(factor) / 0.69314718055994531), factor < 0.0}};
}

dpo_fast::Launch checked_launch(int64_t cluster, int64_t blocks) {
  STD_TORCH_CHECK(cluster >= 1 && cluster <= dpo_fast::kMaxCluster && blocks > 0 &&
                      blocks % cluster == 0 && blocks <= 65535,
                  "cluster=", cluster, " must be 1 or ", dpo_fast::kMaxCluster, " and blocks=",
                  blocks, " a multiple of it in 1..65535");
  return {static_cast<int>(cluster), static_cast<int>(blocks), 0, nullptr};
}

// On the device of `hidden` and its current stream.
template <class Function>
void launch(const Tensor& hidden, dpo_fast::Launch how, Function function) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  const int32_t device = hidden.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);  // restores the caller's
  how.device = device;
  // Not by torch's own macro: its name is another one in 2.10 and 2.11.
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &how.stream) == AOTI_TORCH_SUCCESS,
                  "torch has no current stream for device ", device);
  const char* wrong = function(how);
  STD_TORCH_CHECK(wrong == nullptr, "dpo_fast_sm90: ", wrong);
}

void rows(Tensor hidden, Tensor weight, Tensor targets, double factor, Tensor offset,
          MaybeTensor kept, MaybeTensor repair, Tensor partials, Tensor score, Tensor shift,
          Tensor maximum, Tensor total, MaybeTensor weighted, MaybeTensor squares, int64_t cluster,
          int64_t blocks) {
  const auto how = checked_launch(cluster, blocks);
  const auto x = operands(hidden, weight, targets, factor);
  const int64_t T = x.tokens, V = x.vocab;
  const int64_t tiles_v = (V + dpo_fast::kBlockV - 1) / dpo_fast::kBlockV;
  const int64_t unit = dpo_fast::kBlockT * cluster;
  STD_TORCH_CHECK(weighted.has_value() == squares.has_value(),
                  "weighted and squares come together");
  check_vector("partials", partials, ScalarType::Float, {weighted.has_value() ? 4 : 2, tiles_v, T});
  std::vector<std::pair<const char*, const Tensor*>> all = {{"weight", &weight},
                                                            {"targets", &targets},
                                                            {"partials", &partials},
                                                            {"offset", &offset},
                                                            {"score", &score},
                                                            {"shift", &shift},
                                                            {"maximum", &maximum},
                                                            {"total", &total}};
  for (size_t i = 3; i < all.size(); ++i) {
    check_vector(all[i].first, *all[i].second, ScalarType::Float, {T});
  }
  const auto also = [&](const char* name, const MaybeTensor& tensor) {
    if (!tensor.has_value()) return;
    check_vector(name, *tensor, ScalarType::Float, {T});
    all.emplace_back(name, &*tensor);
  };
  also("weighted", weighted);
  also("squares", squares);
  if (kept.has_value()) {
    check_matrix("kept", *kept, T, V);
    all.emplace_back("kept", &*kept);
  }
  if (repair.has_value()) {
    check_vector("repair", *repair, ScalarType::Char, {1 + (T + unit - 1) / unit});
    all.emplace_back("repair", &*repair);
  }
  check_device("hidden", hidden, hidden);
  for (const auto& [name, tensor] : all) check_device(name, *tensor, hidden);
  launch(hidden, how, [&](const dpo_fast::Launch& on) {
    return dpo_fast::launch_rows(
        x,
        {pointer<float>(offset), pointer<void>(kept),
         kept.has_value() ? row_stride(*kept) : 0, pointer<const int8_t>(repair),
         pointer<float>(partials), pointer<float>(score), pointer<float>(shift),
         pointer<float>(maximum), pointer<float>(total), pointer<float>(weighted),
         pointer<float>(squares)},
        on);
  });
}

void gradient(Tensor hidden, Tensor weight, Tensor targets, double factor, Tensor offset,
              Tensor hit, Tensor per_p, int64_t first_column, Tensor out, int64_t cluster,
              int64_t blocks) {
  const auto how = checked_launch(cluster, blocks);
  const auto x = operands(hidden, weight, targets, factor);
  check_vector("offset", offset, ScalarType::Float, {x.tokens});
  check_vector("hit", hit, ScalarType::Float, {x.tokens});
  check_vector("per_p", per_p, ScalarType::Float, {x.tokens});
  check_matrix("out", out, x.tokens, x.vocab);
  check_device("hidden", hidden, hidden);
  check_device("weight", weight, hidden);
  check_device("targets", targets, hidden);
  check_device("offset", offset, hidden);
  check_device("hit", hit, hidden);
  check_device("per_p", per_p, hidden);
  check_device("out", out, hidden);
  launch(hidden, how, [&](const dpo_fast::Launch& on) {
    return dpo_fast::launch_gradient(
        x,
        {pointer<const float>(offset), pointer<const float>(hit), pointer<const float>(per_p),
         first_column, pointer<void>(out), row_stride(out)},
        on);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(dpo_fast_sm90, m) {
  m.def(
      "rows(Tensor hidden, Tensor weight, Tensor targets, float factor, "
      "Tensor(a!) offset, Tensor(b!)? kept, Tensor? repair, Tensor(c!) partials, "
      "Tensor(d!) score, Tensor(e!) shift, Tensor(f!) maximum, Tensor(g!) total, "
      "Tensor(h!)? weighted, Tensor(i!)? squares, "
      "int cluster, int blocks) -> ()");
  m.def(
      "gradient(Tensor hidden, Tensor weight, Tensor targets, float factor, Tensor offset, "
      "Tensor hit, Tensor per_p, int first_column, Tensor(a!) out, int cluster, int blocks) -> ()");
}

// For every device, so that a wrong one gets our message.
STABLE_TORCH_LIBRARY_IMPL(dpo_fast_sm90, CompositeExplicitAutograd, m) {
  m.impl("rows", TORCH_BOX(&rows));
  m.impl("gradient", TORCH_BOX(&gradient));
}
