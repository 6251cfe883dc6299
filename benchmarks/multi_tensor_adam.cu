// AdamW on many fp32 tensors, launched as the multi-tensor kernels of Apex and TransformerEngine
// are. A block takes 65,536 elements. A thread moves four of them at a time, with one access each;
// they are as far apart as the block is wide. The pointers and sizes of the tensors are arguments
// of the launch, which limits it to 320 blocks and 36 tensors. NVRTC compiles it. The tests also
// compile it with g++.

constexpr int THREADS = 512;
constexpr int ELEMENTS = 4;
constexpr int CHUNK = 65536;
constexpr int MAX_TENSORS = 36;
constexpr int MAX_BLOCKS = 320;

#ifdef __CUDACC__
#define SQUARE_ROOT __fsqrt_rn
#else
#define SQUARE_ROOT __builtin_sqrtf
#define __grid_constant__
#endif

// multi_tensor_adam.py has the same structure.
struct Arguments {
    const float* grad[MAX_TENSORS];
    float* param[MAX_TENSORS];
    float* exp_avg[MAX_TENSORS];
    float* exp_avg_sq[MAX_TENSORS];
    long long numel[MAX_TENSORS];
    int chunk_of_block[MAX_BLOCKS];
    unsigned char tensor_of_block[MAX_BLOCKS];
    float lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay;
    float correction1, correction2;  // 1 / (1 - beta^step)
};

extern "C" __global__ void __launch_bounds__(THREADS)
    multi_tensor_adam(const __grid_constant__ Arguments arguments) {
    const int tensor = arguments.tensor_of_block[blockIdx.x];
    const long long first = (long long)arguments.chunk_of_block[blockIdx.x] * CHUNK;
    const long long rest = arguments.numel[tensor] - first;
    const int count = rest < CHUNK ? int(rest) : CHUNK;
    const float* grad = arguments.grad[tensor] + first;
    float* param = arguments.param[tensor] + first;
    float* exp_avg = arguments.exp_avg[tensor] + first;
    float* exp_avg_sq = arguments.exp_avg_sq[tensor] + first;

    for (int begin = 0; begin < count; begin += THREADS * ELEMENTS) {
        float g[ELEMENTS], p[ELEMENTS], m[ELEMENTS], v[ELEMENTS];
#pragma unroll
        for (int k = 0; k < ELEMENTS; ++k) {
            const int i = begin + k * THREADS + int(threadIdx.x);
            const bool is_inside = i < count;
            g[k] = is_inside ? grad[i] : 0.0f;
            p[k] = is_inside ? param[i] : 0.0f;
            m[k] = is_inside ? exp_avg[i] : 0.0f;
            v[k] = is_inside ? exp_avg_sq[i] : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < ELEMENTS; ++k) {
            m[k] = arguments.beta1 * m[k] + arguments.one_minus_beta1 * g[k];
            v[k] = arguments.beta2 * v[k] + arguments.one_minus_beta2 * g[k] * g[k];
            const float root = SQUARE_ROOT(v[k] * arguments.correction2);
            const float update = m[k] * arguments.correction1 / (root + arguments.eps);
            p[k] -= arguments.lr * (update + arguments.weight_decay * p[k]);
        }
#pragma unroll
        for (int k = 0; k < ELEMENTS; ++k) {
            const int i = begin + k * THREADS + int(threadIdx.x);
            if (i < count) {
                param[i] = p[k];
                exp_avg[i] = m[k];
                exp_avg_sq[i] = v[k];
            }
        }
    }
}
