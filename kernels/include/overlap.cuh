// Launches that overlap (programmatic dependent launch). What includes this is compiled for Hopper, too; see build.rs.
#pragma once

namespace ptx {

// Of a launch that may overlap the one before it (programmatic dependent launch): waits until that one has ended and what it
// wrote can be read. Without overlap, and before Hopper, nothing happens.
__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the launch after this one start, if it may overlap, as soon as every block has come here. After the wait: then whoever
// comes next knows that all before this launch has ended.
__device__ __forceinline__ void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace ptx
