/* Marks functions that hosts and GPUs share. */
#ifndef LSA_KERNELS_CORE_HOST_DEVICE_H
#define LSA_KERNELS_CORE_HOST_DEVICE_H

#ifdef __CUDACC__
#define LSA_HOST_DEVICE __host__ __device__
#else
#define LSA_HOST_DEVICE
#endif

#endif
