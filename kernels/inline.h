/* inline.h - QM_INLINE: a small function that C and CUDA share, on the host and on the device. */
#ifndef QM_INLINE_H
#define QM_INLINE_H

#ifdef __CUDACC__
#define QM_INLINE static __host__ __device__ __forceinline__
#else
#define QM_INLINE static inline
#endif

#endif
