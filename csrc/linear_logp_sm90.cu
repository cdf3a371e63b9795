// The first product of linear_logp on Hopper: tensor maps and launches.
#include "linear_logp_sm90.h"

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "epilogues_sm90.cuh"
#include "finish.cuh"
#include "product_sm90.cuh"

namespace dpo_fast {
namespace {

// From the driver that is loaded, so that nothing is linked to libcuda.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                     &found);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encode;
}

// A [rows, columns] matrix of bf16 as boxes of 128 bytes times `box_rows` in the 128-byte swizzle.
const char* encode(CUtensorMap* map, const void* data, int64_t rows, int64_t columns,
                   int64_t stride, int box_rows) {
  const auto encoder = tensor_map_encoder();
  if (encoder == nullptr) return "the driver has no cuTensorMapEncodeTiled: update it";
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[] = {kSwizzleRow / 2, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encoder(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, strides,
              box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refuses a matrix's layout";
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

const char* message(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class... Parameters, class... Arguments>
const char* start(void (*kernel)(Parameters...), int blocks, int threads, size_t shared_bytes,
                  int cluster_size, void* stream, const Arguments&... arguments) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(cluster_size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  return message(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <class Epilogue>
const char* launch_product(const Operands& x, const Launch& launch, const int8_t* repair,
                           void* stored, int64_t stored_stride, const Epilogue& epilogue) {
  // This library has a CUDA runtime of its own, and that a current device of its own.
  const cudaError_t selected = cudaSetDevice(launch.device);
  if (selected != cudaSuccess) return message(selected);
  CUtensorMap hidden{}, weight{}, out{};
  const char* wrong = encode(&hidden, x.hidden, x.tokens, x.depth, x.hidden_stride, kBlockT);
  if (wrong == nullptr) {
    wrong = encode(&weight, x.weight, x.vocab, x.depth, x.weight_stride, kBlockV / launch.cluster);
  }
  if (wrong == nullptr && Epilogue::kStores) {
    wrong = encode(&out, stored, x.tokens, x.vocab, stored_stride, sm90::kStagedRows);
  }
  if (wrong != nullptr) return wrong;

  const auto kernel = sm90::product_kernel<Epilogue>;
  const int bytes = sizeof(sm90::Shared);
  const cudaError_t sized =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (sized != cudaSuccess) return message(sized);

  const sm90::Schedule schedule{ceil_div(x.tokens, kBlockT * launch.cluster),
                                ceil_div(x.vocab, kBlockV), ceil_div(x.depth, kBlockD), repair};
  return start(kernel, launch.blocks, kThreads, bytes, launch.cluster, launch.stream, hidden,
               weight, out, schedule, epilogue);
}

}  // namespace

const char* launch_rows(const Operands& x, const RowSums& rows, const Launch& launch) {
  const int T = x.tokens, V = x.vocab, tiles_v = ceil_div(V, kBlockV);
  const bool keeps = rows.kept != nullptr;
  const auto sums = [&](auto kept, auto extras) {
    return launch_product(
        x, launch, rows.repair, rows.kept, rows.kept_stride,
        sm90::SumRows<decltype(kept)::value, decltype(extras)::value>{
            x.targets, rows.offset, rows.partials, rows.score, x.frame, T, V, tiles_v});
  };
  using No = std::false_type;
  using Yes = std::true_type;
  const char* wrong = rows.weighted == nullptr ? (keeps ? sums(Yes{}, No{}) : sums(No{}, No{}))
                                               : (keeps ? sums(Yes{}, Yes{}) : sums(No{}, Yes{}));
  if (wrong != nullptr) return wrong;
  const sm90::Finish finish{rows.repair,  rows.partials, rows.score,    rows.offset,
                            rows.shift,   rows.maximum,  rows.total,    rows.weighted,
                            rows.squares, x.frame.scale, T,             tiles_v,
                            !keeps};
  return start(sm90::finish_kernel, ceil_div(T, sm90::kFinishTokens),
               sm90::kFinishTokens * sm90::kFinishStrands, 0, 1, launch.stream, finish);
}

const char* launch_gradient(const Operands& x, const GradientTile& tile, const Launch& launch) {
  return launch_product(x, launch, nullptr, tile.out, tile.out_stride,
                        sm90::MakeGradient{x.targets, tile.offset, tile.hit, tile.per_p,
                                           tile.first_column, x.frame, x.tokens, x.vocab});
}

}  // namespace dpo_fast
