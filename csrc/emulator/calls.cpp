// What the tests call, by ctypes: the launches of linear_logp_sm90.h with a seed for the order of
// events.
#include "fibers.h"

#include "../layout.cuh"

extern "C" {

const char* emulated_rows(const dpo_fast::Operands* x, const dpo_fast::RowSums* rows,
                          const dpo_fast::Launch* launch, unsigned seed) {
  emulated::machine.random.seed(seed);
  emulated::machine.error.clear();
  return dpo_fast::launch_rows(*x, *rows, *launch);
}

const char* emulated_gradient(const dpo_fast::Operands* x, const dpo_fast::GradientTile* tile,
                              const dpo_fast::Launch* launch, unsigned seed) {
  emulated::machine.random.seed(seed);
  emulated::machine.error.clear();
  return dpo_fast::launch_gradient(*x, *tile, *launch);
}

int unit_of(int index, int units_t, int tiles_v) {
  const dpo_fast::Unit unit = dpo_fast::unit_of(index, units_t, tiles_v);
  return unit.t * tiles_v + unit.v;
}
}
