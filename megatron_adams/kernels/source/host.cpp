// The host form: the same elements in the same chunks, by OpenMP threads and the compiler's vectors.

#include "element.h"
#include "multi_tensor.h"

namespace adams {

template <bool STORE, int DECAY>
static void process(const Table& table, const Scalars& scalars, int num_threads) {
    const long long num_chunks = Table::get(table, CHUNK_END, table.num_tensors - 1);
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (long long index = 0; index < num_chunks; ++index) {
        const Chunk chunk = chunk_at(table, index);
        const Grad::Storage* __restrict grad = chunk.grad;
        Param::Storage* __restrict param = chunk.param;
        ExpAvg::Storage* __restrict exp_avg = chunk.exp_avg;
        Main::Storage* __restrict main = chunk.main;
        Scalars s = scalars;
        // Known when the loop is compiled: otherwise both kinds' roots and quotients are computed.
        s.decay = DECAY;
        const TensorScales scales = chunk.scales;
        int param_amax = 0, exp_avg_amax = 0, main_amax = 0;
#pragma omp simd reduction(max : param_amax, exp_avg_amax, main_amax)
        for (int i = 0; i < chunk.count; ++i) {
            Amax amax = {0, 0, 0};
            update_element<STORE>(i, grad, param, exp_avg, main, s, scales, amax);
            param_amax = larger(param_amax, amax.param);
            exp_avg_amax = larger(exp_avg_amax, amax.exp_avg);
            main_amax = larger(main_amax, amax.main);
        }
        merge_amax<STORE>(table, chunk.tensor, {param_amax, exp_avg_amax, main_amax});
        if (STORE && chunk.is_first) write_param_scale_inv(table, chunk);
    }
}

template <bool STORE>
static void process(const Table& table, const Scalars& scalars, int num_threads) {
    switch (scalars.decay) {
        case NO_DECAY: return process<STORE, NO_DECAY>(table, scalars, num_threads);
        case DECOUPLED: return process<STORE, DECOUPLED>(table, scalars, num_threads);
        case L2: return process<STORE, L2>(table, scalars, num_threads);
    }
}

}  // namespace adams

extern "C" void adams_update(ADAMS_PARAMETERS, int num_threads) {
    if (ADAMS_IS_SKIPPED) return;
    adams::process<true>({table, num_tensors, amax}, ADAMS_SCALARS, num_threads);
}

#if ADAMS_SCALED
extern "C" void adams_measure(ADAMS_PARAMETERS, int num_threads) {
    if (ADAMS_IS_SKIPPED) return;
    adams::process<false>({table, num_tensors, amax}, ADAMS_SCALARS, num_threads);
}

extern "C" void adams_finish(ADAMS_PARAMETERS, int) {
    if (ADAMS_IS_SKIPPED) return;
    for (int t = 0; t < num_tensors; ++t) adams::finish_tensor({table, num_tensors, amax}, t);
}
#endif
