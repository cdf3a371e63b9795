// Hopper's instructions as functions: mbarriers, bulk tensor copies, wgmma, clusters. PTX ISA 8.0,
// sm_90a.
#ifndef DPO_FAST_SM90_CUH
#define DPO_FAST_SM90_CUH

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "layout.cuh"

#define DPO_FAST_DEVICE __device__ __forceinline__

namespace dpo_fast::sm90 {

using Barrier = uint64_t;  // in shared memory

// All dynamic shared memory of the block. The swizzle wants stages at multiples of 1024.
DPO_FAST_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

DPO_FAST_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// One lane of a converged warp.
DPO_FAST_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(elected));
  return elected != 0;
}

// Lanes that went different ways, together again.
DPO_FAST_DEVICE void sync_warp() { __syncwarp(); }

// 0..127. Volatile: what follows from it is computed where it is used, not held through a product.
DPO_FAST_DEVICE int thread_of_warpgroup() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  return thread % 128;
}

// The same number of registers in all warps of a warpgroup; needs a cap at entry
// (__launch_bounds__).
template <int kRegisters>
DPO_FAST_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
DPO_FAST_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// Clusters.

DPO_FAST_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

DPO_FAST_DEVICE uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(size));
  return size;
}

// All threads of all blocks of the cluster; orders their shared memory.
DPO_FAST_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
}

// Mbarriers.
// A phase is over when `arrivals` threads have arrived and all bytes that were announced are there.

DPO_FAST_DEVICE void init(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes initialised barriers known to the cluster and to the copy engine; cluster_sync() must
// follow.
DPO_FAST_DEVICE void fence_init() {
  asm volatile(
      "fence.mbarrier_init.release.cluster;\n"
      "fence.proxy.async.shared::cta;\n" ::
          : "memory");
}

DPO_FAST_DEVICE void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(
                   shared_address(barrier))
               : "memory");
}

// Arrives, and announces bytes that copies will bring.
DPO_FAST_DEVICE void arrive_expecting(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Arrives at the same barrier in block `rank` of the cluster. It tells that asynchronous reads are
// over, which wait_products has seen to, and publishes no ordinary store: so no .release.cluster,
// which would be a fence of the whole GPU at every stage.
DPO_FAST_DEVICE void arrive_at(Barrier* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(
          shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Waits until the phase of this parity is over. Only the phase that runs and the one before it can
// be told apart. A fresh barrier lets parity 1 through.
DPO_FAST_DEVICE void wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@over bra done;\n"
      "bra again;\n"
      "done:\n}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Bulk tensor copies.
// x counts elements along the contiguous dimension, y rows. Reads past the ends give zeros and
// count as bytes all the same; writes past the ends do not happen.

DPO_FAST_DEVICE void prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

DPO_FAST_DEVICE void load_tile(void* to, const CUtensorMap* map, Barrier* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];\n" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

// To the same place in every block of `mask`, and counted at the same barrier of each.
DPO_FAST_DEVICE void load_tile_to_all(void* to, const CUtensorMap* map, Barrier* barrier, int x,
                                      int y, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;\n" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "h"(mask), "r"(x), "r"(y)
      : "memory");
}

DPO_FAST_DEVICE void store_tile(const CUtensorMap* map, const void* from, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];\n" ::"l"(
          reinterpret_cast<uint64_t>(map)),
      "r"(shared_address(from)), "r"(x), "r"(y)
      : "memory");
}

DPO_FAST_DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }

// This thread's stores but the last `kPending` groups have read their shared memory.
template <int kPending>
DPO_FAST_DEVICE void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(kPending) : "memory");
}

// An ordinary store that the copy engine reads after fence_async_proxy() and a barrier.
DPO_FAST_DEVICE void write_shared(void* to, uint32_t value) {
  *static_cast<uint32_t*>(to) = value;
}

DPO_FAST_DEVICE void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// The 128 threads of one warpgroup; `id` 1..15, another for each.
DPO_FAST_DEVICE void sync_warpgroup(int id) {
  asm volatile("bar.sync %0, 128;\n" ::"r"(id) : "memory");
}

// Wgmma.
// Asynchronous: accumulators may be touched again, and operands overwritten, after wait_products.

DPO_FAST_DEVICE void fence_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
DPO_FAST_DEVICE void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
template <int kPending>
DPO_FAST_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving what it does with accumulators to before this line: it does not
// know that wait_products makes them valid.
DPO_FAST_DEVICE void hold(float (&d)[kFragment]) {
#pragma unroll
  for (int i = 0; i < kFragment; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define DPO_FAST_R8(d, i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])

// d = a b^T, plus d if `accumulate`: bf16 [64, 16] and [192, 16] in shared memory, both K-major,
// into fp32.
DPO_FAST_DEVICE void multiply(float (&d)[kFragment], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kBlockV == 192 && kFragment == 96, "the instruction below has 192 columns");
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
      "%96, %97, p, 1, 1, 0, 0;\n}\n"
      : DPO_FAST_R8(d, 0), DPO_FAST_R8(d, 8), DPO_FAST_R8(d, 16), DPO_FAST_R8(d, 24),
        DPO_FAST_R8(d, 32), DPO_FAST_R8(d, 40), DPO_FAST_R8(d, 48), DPO_FAST_R8(d, 56),
        DPO_FAST_R8(d, 64), DPO_FAST_R8(d, 72), DPO_FAST_R8(d, 80), DPO_FAST_R8(d, 88)
      : "l"(a), "l"(b), "r"(static_cast<uint32_t>(accumulate)));
}

#undef DPO_FAST_R8

// Arithmetic.


// 2^x to 2 units in the last place; below 2^-126 it is 0.
DPO_FAST_DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
DPO_FAST_DEVICE float shuffle_xor(float value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

// Two bf16 in one word, `low` at the lower address, each rounded to nearest even.
DPO_FAST_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

}  // namespace dpo_fast::sm90

#endif
