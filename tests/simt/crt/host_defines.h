// CUDA's vector and 16-bit float headers ask for this file, which only a whole toolkit brings; the
// runtime wheel alone does not. A toolkit's own copy, where there is one, is found before this.
#pragma once
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __cuda_builtin__
#define __cudart_builtin__
#define __device_builtin__
#define __device_builtin_surface_type__
#define __device_builtin_texture_type__
