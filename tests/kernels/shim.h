// What device.cu uses of CUDA, for g++. emulator.py puts this text before the kernel's.
//
// The lanes of a warp are fibers. Each runs to its next reduction or to its end, and then the next
// lane runs. A lane that ends where others wait is an error: on a GPU that would be undefined.
// Blocks, warps and lanes run in any order that is asked for.

#include <ucontext.h>

#define __global__
#define __launch_bounds__(...)

namespace shim {

constexpr int LANES = 32;
constexpr int STACK_BYTES = 64 * 1024;

struct Index {
    unsigned x;
};

struct Lane {
    ucontext_t context;
    Index thread;
    bool is_finished;
    alignas(16) char stack[STACK_BYTES];
};

static Lane lanes[LANES];
static Lane* current;
static ucontext_t scheduler;
// Two reductions are alive: the one that the lanes come to, and the one that they come from.
static int maxima[2];
static unsigned sums[2];
static int round;

// What is executed of a grid, and in which order. emulator.py has the same structure.
struct Grid {
    const long long* blocks;
    long long num_blocks;
    const int* warps;
    int num_warps;
    const int* lanes;
};

template <class Body>
struct Launch {
    static inline const Body* body;

    static void run_lane() {
        (*body)();
        current->is_finished = true;
    }

    // Whether all lanes came to the same reductions.
    static bool run_warp(int first_thread, const int* order) {
        for (int i = 0; i < LANES; ++i) {
            lanes[i].thread.x = first_thread + i;
            lanes[i].is_finished = false;
            getcontext(&lanes[i].context);
            lanes[i].context.uc_stack.ss_sp = lanes[i].stack;
            lanes[i].context.uc_stack.ss_size = STACK_BYTES;
            lanes[i].context.uc_link = &scheduler;
            makecontext(&lanes[i].context, run_lane, 0);
        }
        for (round = 0;; ++round) {
            maxima[round % 2] = -0x7fffffff - 1;
            sums[round % 2] = 0;
            int num_finished = 0;
            for (int i = 0; i < LANES; ++i) {
                current = &lanes[order[i]];
                swapcontext(&scheduler, &current->context);
                num_finished += current->is_finished;
            }
            if (num_finished > 0) return num_finished == LANES;
        }
    }
};

}  // namespace shim

static shim::Index blockIdx;
#define threadIdx (shim::current->thread)
constexpr int warpSize = shim::LANES;

static inline int __reduce_max_sync(unsigned mask, int value) {
    if (mask != 0xffffffffu) __builtin_trap();  // a reduction of some lanes is not emulated
    int& maximum = shim::maxima[shim::round % 2];
    if (value > maximum) maximum = value;
    swapcontext(&shim::current->context, &shim::scheduler);
    return maximum;
}

static inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
    if (mask != 0xffffffffu) __builtin_trap();
    unsigned& sum = shim::sums[shim::round % 2];
    if (__builtin_add_overflow(sum, value, &sum)) __builtin_trap();
    swapcontext(&shim::current->context, &shim::scheduler);
    return sum;
}

namespace shim {

// Returns 0, or 1 if the lanes of a warp diverged at a reduction.
template <class... Arguments>
int run(void (*kernel)(Arguments...), const Grid& grid, Arguments... arguments) {
    const auto body = [&] { kernel(arguments...); };
    using ThisLaunch = Launch<decltype(body)>;
    ThisLaunch::body = &body;
    for (long long block = 0; block < grid.num_blocks; ++block) {
        blockIdx.x = unsigned(grid.blocks[block]);
        for (int warp = 0; warp < grid.num_warps; ++warp) {
            if (!ThisLaunch::run_warp(grid.warps[warp] * LANES, grid.lanes)) return 1;
        }
    }
    return 0;
}

template <class Kernel, Kernel* kernel>
struct EntryPoint;
template <class... Arguments, void (*kernel)(Arguments...)>
struct EntryPoint<void(Arguments...), kernel> {
    static int run(const Grid* grid, Arguments... arguments) {
        return shim::run(kernel, *grid, arguments...);
    }
};

}  // namespace shim

// Export a pointer to a function that runs a kernel. It takes a Grid before the kernel's own
// arguments.
#define EMULATED(kernel) \
    extern "C" auto* const emulated_##kernel = &shim::EntryPoint<decltype(kernel), kernel>::run;
