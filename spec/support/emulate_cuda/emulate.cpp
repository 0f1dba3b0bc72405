/* emulate.cpp - blocks, their threads as fibers, warps, shared memory. */
#include "emulate.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <vector>

#include "runtime.h"
#include "threads.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

static const size_t STACK_BYTES = 256 << 10, PAGE = 4096;
/* Where a block's own allocation begins among its shared memory: not at a multiple of 1024. */
static const uint32_t SHARED_BEGIN = 0x480, SHARED_MOST = 227 << 10;
/* Addresses of static shared memory begin here, for mbarriers. */
static const uint32_t STATIC_BEGIN = 0x80000000u;
alignas(1024) static char anchor;

struct warp {
  uint32_t alive, mask, arrived;
  uint64_t turn;
  void *lanes[32];
  void (*act)(void *const *lanes);
};
static std::vector<fiber> fibers;
static std::vector<warp> warps;
static int now, alive, at_block;
static uint64_t block_turn;
static bool progress;
static char *shared;
static size_t shared_bytes;
static const std::function<void()> *body;

void die(const char *what, ...) {
  va_list arguments;
  va_start(arguments, what);
  fprintf(stderr, "emulated CUDA: block (%u, %u, %u), thread %d: ", blockIdx.x, blockIdx.y,
          blockIdx.z, now);
  vfprintf(stderr, what, arguments);
  fprintf(stderr, "\n");
  abort();
}

/* ---- fibers ---- */

#ifdef __x86_64__
/* Keep what a call must keep on the stack that is left. The C library's own switch asks the kernel
** for the signal mask each time, which takes ten times as long. */
typedef void *place;
extern "C" void emulate_switch(void **from, void *to);
asm(".text\n.globl emulate_switch\n.hidden emulate_switch\nemulate_switch:\n"
    "push %rbx\npush %rbp\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbp\npop %rbx\nret\n");
static void change(place &from, place &to) { emulate_switch(&from, to); }
static void prepare(place &out, char *stack, void (*entry)()) {
  void **top = (void **)(stack + STACK_BYTES);
  *--top = nullptr; /* so that the stack is aligned as after a call */
  *--top = (void *)entry;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  out = top;
}
#else
typedef ucontext_t place;
static void change(place &from, place &to) { swapcontext(&from, &to); }
static void prepare(place &out, char *stack, void (*entry)()) {
  getcontext(&out);
  out.uc_stack.ss_sp = stack;
  out.uc_stack.ss_size = STACK_BYTES;
  makecontext(&out, entry, 0);
}
#endif

static std::vector<char *> stacks;
static std::vector<place> places;
static place home;

static char *stack_of(size_t i) {
  while (stacks.size() <= i) {
    char *memory = (char *)mmap(NULL, STACK_BYTES + PAGE, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) die("no memory for a thread's stack");
    mprotect(memory, PAGE, PROT_NONE);
    stacks.push_back(memory + PAGE);
  }
  return stacks[i];
}

static void enter(int i) {
  now = i;
  threadIdx = fibers[(size_t)i].index;
  change(home, places[(size_t)i]);
}
void pause() {
  const int mine = now;
  change(places[(size_t)mine], home);
}
void note_progress() { progress = true; }
int thread() { return now; }
fiber &self() { return fibers[(size_t)now]; }

/* ---- barriers ---- */

static void open_block_if_all() {
  if (alive == 0 || at_block < alive) return;
  at_block = 0;
  block_turn++;
  progress = true;
}

void sync_block() {
  const uint64_t turn = block_turn;
  at_block++;
  open_block_if_all();
  while (block_turn == turn) pause();
}

static void open_warp_if_all(warp &w) {
  if (w.arrived == 0 || w.arrived != (w.mask & w.alive)) return;
  w.act(w.lanes);
  w.arrived = 0;
  memset(w.lanes, 0, sizeof w.lanes);
  w.turn++;
  progress = true;
}

void meet(uint32_t mask, void *mine, void (*act)(void *const *lanes)) {
  warp &w = warps[(size_t)now / 32];
  const uint32_t bit = 1u << now % 32;
  if ((mask & bit) == 0) die("a lane meets others without being among them");
  while (w.arrived != 0 && w.mask != mask) pause(); /* another part of the warp comes first */
  if (w.arrived != 0 && w.act != act) die("lanes of a warp meet in different instructions");
  w.mask = mask;
  w.act = act;
  w.arrived |= bit;
  w.lanes[now % 32] = mine;
  const uint64_t turn = w.turn;
  open_warp_if_all(w);
  while (w.turn == turn) pause();
}

static void run_thread() {
  (*body)();
  fiber &mine = self();
  if (!mine.copies.empty()) die("a thread ends while its copies are under way");
  if (!mine.products.empty()) die("a thread ends while its products are under way");
  mine.done = true;
  progress = true;
  alive--;
  warp &w = warps[(size_t)now / 32];
  w.alive &= ~(1u << now % 32);
  open_warp_if_all(w);
  open_block_if_all();
  pause();
}

/* ---- shared memory ---- */

void *dynamic_shared() { return shared; }

uint32_t shared_address(const void *at) {
  const char *byte = (const char *)at;
  if (byte >= shared && byte <= shared + shared_bytes)
    return SHARED_BEGIN + (uint32_t)(byte - shared);
  return STATIC_BEGIN + (uint32_t)(byte - &anchor);
}

char *shared_memory(uint32_t address, uint32_t bytes, uint32_t alignment) {
  if (address % alignment != 0) die("shared address %#x is not aligned to %u", address, alignment);
  if (address >= STATIC_BEGIN - (1u << 30)) return &anchor + (int32_t)(address - STATIC_BEGIN);
  if (address < SHARED_BEGIN || address + bytes > SHARED_BEGIN + shared_bytes)
    die("shared address %#x is none of the block's %zu bytes", address, shared_bytes);
  return shared + (address - SHARED_BEGIN);
}

/* ---- launches ---- */

static void run_block(bool backwards) {
  const int threads = (int)(blockDim.x * blockDim.y * blockDim.z);
  fibers.assign((size_t)threads, fiber{});
  places.resize((size_t)threads);
  warps.assign((size_t)(threads + 31) / 32, warp{});
  alive = threads;
  at_block = 0;
  block_turn = 0;
  memset(shared, 0xFF, shared_bytes);
  for (int i = 0; i < threads; i++) {
    const unsigned x = blockDim.x, y = blockDim.y, n = (unsigned)i;
    fibers[(size_t)i].index = dim3(n % x, n / x % y, n / x / y);
    warps[(size_t)i / 32].alive |= 1u << i % 32;
    prepare(places[(size_t)i], stack_of((size_t)i), run_thread);
  }
  while (alive > 0) {
    progress = false;
    for (int n = 0; n < threads; n++) {
      const int i = backwards ? threads - 1 - n : n;
      if (!fibers[(size_t)i].done) enter(i);
    }
    if (!progress)
      die("deadlock: of %d threads %d have ended and %d wait for the block", threads,
          threads - alive, at_block);
  }
}

static void run_grid(const shape &at, const std::function<void()> &work) {
  gridDim = at.grid;
  blockDim = at.block;
  body = &work;
  shared_bytes = at.shared_bytes;
  if (posix_memalign((void **)&shared, 1024, shared_bytes + (shared_bytes == 0)) != 0) abort();
  for (unsigned z = 0; z < at.grid.z; z++)
    for (unsigned y = 0; y < at.grid.y; y++)
      for (unsigned x = 0; x < at.grid.x; x++) {
        blockIdx = dim3(x, y, z);
        run_block((x + y) % 2 != 0);
      }
  free(shared);
}

/* A bad address in a kernel loses the device, as it does on a GPU. */
static sigjmp_buf lost;
static void lose(int) { siglongjmp(lost, 1); }

static void run(const shape &at, const std::function<void()> &work) {
  struct sigaction mine = {}, before;
  mine.sa_handler = lose;
  sigaction(SIGSEGV, &mine, &before);
  if (sigsetjmp(lost, 1) == 0)
    run_grid(at, work);
  else
    runtime_lose();
  sigaction(SIGSEGV, &before, NULL);
}

void queue(cudaStream_t stream, std::function<void()> work) { runtime_queue(stream, work); }

void launch_body(const shape &at, std::function<void()> work) {
  const uint64_t threads = (uint64_t)at.block.x * at.block.y * at.block.z;
  const bool grid = at.grid.x > 0 && at.grid.y > 0 && at.grid.z > 0 && at.grid.x <= 0x7FFFFFFF &&
                    at.grid.y <= 65535 && at.grid.z <= 65535;
  if (!grid || threads == 0 || threads > 1024 || at.shared_bytes > SHARED_MOST)
    return runtime_fail(cudaErrorInvalidConfiguration);
  runtime_queue(at.stream, [=] { run(at, work); });
}

}  // namespace emulate

extern "C" cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) {
  *value = (int)emulate::SHARED_MOST;
  return cudaSuccess;
}
