// Threads of a cluster as fibers, in an order drawn at random, and things that happen beside them.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace emulated {

struct Block;

struct Fiber {
  unsigned thread = 0, block = 0, grid = 0;  // threadIdx, blockIdx, gridDim
  Block* home = nullptr;
  std::function<bool()> ready;  // what it waits for; empty: it can go on
  const char* waits = "";
  bool done = false;
  // What sm90.h keeps for a thread: groups of bulk stores, each emptied when it has been read;
  // ordinary stores that the copy engine cannot see yet; arrivals at other blocks that have not got
  // there; products issued, and how many there were at each commit.
  std::deque<std::vector<std::pair<void*, uint32_t>>> stores;
  std::vector<std::pair<unsigned char*, uint32_t>> unfenced;
  int messages = 0;
  int products = 0;
  std::vector<int> committed;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
};

// One cluster at a time.
class Machine {
 public:
  std::mt19937 random;
  std::string error;
  Fiber* running = nullptr;
  std::vector<std::function<void()>> events;  // copies under way

  void fail(const std::string& what) {
    if (error.empty()) error = what;
  }

  // Called by a fiber: comes back once `ready` holds.
  void wait_until(const char* waits, std::function<bool()> ready) {
    Fiber* self = running;
    self->waits = waits;
    self->ready = std::move(ready);
    swapcontext(&self->context, &main_);
  }

  void run(std::vector<std::unique_ptr<Fiber>>& fibers, const std::function<void()>& body) {
    body_ = body;
    for (auto& fiber : fibers) start(*fiber);
    std::vector<Fiber*> order;
    for (auto& fiber : fibers) order.push_back(fiber.get());
    // For a whole launch one block, warpgroup or warp may be slow, and so may be what happens
    // beside.
    const Fiber& victim = *order[random() % order.size()];
    const unsigned threads[] = {1 << 20, 128, 32}, paces[] = {1, 8, 40}, lags[] = {1, 3, 30};
    const unsigned alike = threads[random() % 3], pace = paces[random() % 3];
    lag_ = lags[random() % 3];
    const auto slow = [&](const Fiber* fiber) {
      return fiber->block == victim.block && fiber->thread / alike == victim.thread / alike;
    };
    while (error.empty()) {
      order.erase(std::remove_if(order.begin(), order.end(), [](Fiber* f) { return f->done; }),
                  order.end());
      if (order.empty()) break;
      std::shuffle(order.begin(), order.end(), random);
      bool moved = !events.empty();
      happen();
      const unsigned share = 1 + random() % 4;
      for (Fiber* fiber : order) {
        if (fiber->done || (fiber->ready && !fiber->ready())) continue;
        moved = true;
        if (random() % (slow(fiber) ? pace : share) != 0) continue;
        resume(*fiber);
        if (!error.empty()) return;
      }
      if (!moved) return fail(std::string("deadlock: a thread waits for ") + order[0]->waits);
    }
    while (error.empty() && !events.empty()) happen();
  }

 private:
  ucontext_t main_;
  std::function<void()> body_;
  unsigned lag_ = 1;

  void happen() {
    std::vector<std::function<void()>> now;
    for (size_t i = 0; i < events.size();) {
      if (random() % lag_ == 0) {
        now.push_back(events[i]);
        events[i] = events.back();
        events.pop_back();
      } else {
        ++i;
      }
    }
    for (auto& event : now) event();
  }

  static void enter();
  void start(Fiber& fiber) {
    constexpr size_t bytes = 1 << 16;
    fiber.stack.reset(new char[bytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = bytes;
    fiber.context.uc_link = &main_;
    makecontext(&fiber.context, enter, 0);
  }
  void resume(Fiber& fiber) {
    fiber.ready = nullptr;
    running = &fiber;
    swapcontext(&main_, &fiber.context);
  }
};

inline Machine machine;

inline void Machine::enter() {
  machine.body_();
  machine.running->done = true;
}

}  // namespace emulated
