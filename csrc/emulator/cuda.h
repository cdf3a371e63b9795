// The part of CUDA's interface that csrc uses, on a CPU: tensor maps, launches, one cluster after
// the other.
#pragma once

#include <cmath>
#include <cstring>
#include <map>

#include "fibers.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define CUDART_VERSION 13000

template <unsigned emulated::Fiber::*kMember>
struct SpecialRegister {
  struct {
    operator unsigned() const { return emulated::machine.running->*kMember; }
  } x;
};
inline SpecialRegister<&emulated::Fiber::thread> threadIdx;
inline SpecialRegister<&emulated::Fiber::block> blockIdx;
inline SpecialRegister<&emulated::Fiber::grid> gridDim;

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
using cudaStream_t = void*;
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum Constants {
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
  CU_TENSOR_MAP_INTERLEAVE_NONE,
  CU_TENSOR_MAP_SWIZZLE_128B,
  CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaLaunchAttributeClusterDimension,
  cudaEnableDefault,
};
using cudaDriverEntryPointQueryResult = int;

struct CUtensorMap {
  unsigned char* data;
  int64_t sizes[2], stride;  // bytes from row to row
  int box[2];
};

// What the driver refuses, as its documentation has it.
inline CUresult encode_tiled(CUtensorMap* map, int, int rank, void* data, const uint64_t* sizes,
                             const uint64_t* strides, const uint32_t* box, const uint32_t* steps,
                             int, int, int, int) {
  const bool fits = rank == 2 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                    strides[0] % 16 == 0 && strides[0] < uint64_t{1} << 40 && box[0] * 2 <= 128 &&
                    box[0] * 2 % 16 == 0 && box[1] <= 256 && box[1] > 0 && sizes[0] > 0 &&
                    sizes[1] > 0 && sizes[0] <= uint64_t{1} << 32 && steps[0] == 1 && steps[1] == 1;
  if (!fits) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<unsigned char*>(data),
          {static_cast<int64_t>(sizes[0]), static_cast<int64_t>(sizes[1])},
          static_cast<int64_t>(strides[0]),
          {static_cast<int>(box[0]), static_cast<int>(box[1])}};
  return CUDA_SUCCESS;
}
using PFN_cuTensorMapEncodeTiled_v12000 = decltype(&encode_tiled);

inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, int,
                                                    int*) {
  *function = reinterpret_cast<void*>(&encode_tiled);
  return cudaSuccess;
}

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct cudaLaunchAttribute {
  int id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return ::emulated::machine.error.c_str(); }

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int bytes) {
  return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}

namespace emulated {

// A product that a warpgroup has begun to issue: 128 threads bring their accumulators.
struct Product {
  uint64_t a, b;
  bool accumulate;
  std::vector<float*> accumulators;
  bool done = false;
};

struct Meeting {  // of threads at a barrier
  int arrived = 0, generation = 0;
};

constexpr int kSharedBytes = 228 * 1024;

struct Block {
  unsigned rank, cluster;
  std::vector<Block*> peers;
  unsigned char* memory;
  std::unique_ptr<unsigned char[]> storage;
  std::map<int, Meeting> meetings;
  std::map<int, std::vector<Product>> products;  // of each warpgroup
  float lanes[12][2][32];
  Meeting warps[12];
  Meeting* together;  // all threads of the cluster
  int threads, alive;  // the latter: threads that have not ended

  Block(unsigned rank, unsigned cluster, int threads, Meeting* together)
      : rank(rank), cluster(cluster), storage(new unsigned char[kSharedBytes + 1024]),
        together(together), threads(threads), alive(threads) {
    memory = storage.get() + (1024 - reinterpret_cast<uintptr_t>(storage.get()) % 1024);
    std::memset(memory, 0xFF, kSharedBytes);  // NaN in any precision
  }
};

inline void meet(Meeting& meeting, int all, const char* what) {
  const int generation = meeting.generation;
  if (++meeting.arrived == all) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    machine.wait_until(what, [&meeting, generation] { return meeting.generation != generation; });
  }
}

}  // namespace emulated

inline void __syncthreads() {
  ::emulated::Block& block = *::emulated::machine.running->home;
  ::emulated::meet(block.meetings[0], block.threads, "__syncthreads");
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace emulated;
  const unsigned cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  const int threads = config->blockDim.x;
  if (config->gridDim.x == 0 || config->gridDim.x % cluster) return cudaErrorInvalidValue;
  for (unsigned first = 0; first < config->gridDim.x; first += cluster) {
    Meeting together;
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<Block*> peers;
    std::vector<std::unique_ptr<Fiber>> fibers;
    for (unsigned rank = 0; rank < cluster; ++rank) {
      blocks.push_back(std::make_unique<Block>(rank, cluster, threads, &together));
      peers.push_back(blocks.back().get());
    }
    for (unsigned rank = 0; rank < cluster; ++rank) {
      blocks[rank]->peers = peers;
      for (int thread = 0; thread < threads; ++thread) {
        fibers.push_back(std::make_unique<Fiber>());
        Fiber& fiber = *fibers.back();
        fiber.thread = thread;
        fiber.block = first + rank;
        fiber.grid = config->gridDim.x;
        fiber.home = blocks[rank].get();
      }
    }
    machine.run(fibers, [&] {
      kernel(arguments...);
      --machine.running->home->alive;
    });
    machine.events.clear();
    if (!machine.error.empty()) return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
