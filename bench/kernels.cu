// The benchmark's own kernels: random data, and the floor that the library's kernels are held against.

extern "C" {

// Counter-based random bits: the finaliser of MurmurHash3 over the index and a seed.
__device__ unsigned mix(unsigned i, unsigned seed) {
    unsigned h = i * 0x9E3779B1u + seed;
    h ^= h >> 16;
    h *= 0x85EBCA6Bu;
    h ^= h >> 13;
    h *= 0xC2B2AE35u;
    h ^= h >> 16;
    return h;
}

// out[i] = uniform in [-amplitude, amplitude) as float32; 24 random bits, so that the host computes the same.
__global__ void fill_float32(float* out, long long n, unsigned seed, float amplitude) {
    long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride)
        out[i] = ((float)(mix((unsigned)i, seed) >> 8) * 0x1p-23f - 1.0f) * amplitude;
}

// The same, rounded to nearest even bfloat16 (finite inputs only).
__global__ void fill_bfloat16(unsigned short* out, long long n, unsigned seed, float amplitude) {
    long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) {
        float value = ((float)(mix((unsigned)i, seed) >> 8) * 0x1p-23f - 1.0f) * amplitude;
        unsigned bits = __float_as_uint(value);
        out[i] = (unsigned short)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    }
}

__global__ void empty() {}

// Six arguments, for what a launch through CuPy costs the host.
__global__ void take_six(const float*, const float*, float*, int, int, float) {}

// The 1-read floor: read n 16-byte words once, keep nothing. UNROLL loads in flight per thread.
__global__ void read_once(const uint4* __restrict__ in, long long n, unsigned* sink) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    unsigned all = 0;
    for (; i + (UNROLL - 1) * stride < n; i += UNROLL * stride) {
        uint4 word[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) word[u] = __ldg(in + i + u * stride);
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) all |= word[u].x ^ word[u].y ^ word[u].z ^ word[u].w;
    }
    for (; i < n; i += stride) {
        uint4 word = __ldg(in + i);
        all |= word.x ^ word.y ^ word.z ^ word.w;
    }
    if (all == 0x5A5A5A5Bu) *sink = all;  // keeps the loads; practically never true
}

__global__ void copy_once(uint4* __restrict__ out, const uint4* __restrict__ in, long long n) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + (UNROLL - 1) * stride < n; i += UNROLL * stride) {
        uint4 word[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) word[u] = __ldg(in + i + u * stride);
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) out[i + u * stride] = word[u];
    }
    for (; i < n; i += stride) out[i] = __ldg(in + i);
}

}  // extern "C"
