#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
struct Params { const __nv_bfloat16* a; const __nv_bfloat16* b; float* c; int m, n, k; float cb[16]; };
__device__ inline uint32_t sm(const void*p){return (uint32_t)__cvta_generic_to_shared(p);}
extern "C" __global__ void __launch_bounds__(128) mm(const __grid_constant__ Params p){
  extern __shared__ __align__(16) uint8_t smem[];
  __nv_bfloat16* As=(__nv_bfloat16*)smem; __nv_bfloat16* Bs=As+64*40;
  int tid=threadIdx.x, lane=tid&31, warp=tid>>5;
  float acc[8][4]={};
  int m0=blockIdx.y*64,n0=blockIdx.x*64;
  for(int k0=0;k0<p.k;k0+=32){
    for(int i=tid;i<64*4;i+=128){int r=i/4,c=i%4*8;
      int sz = m0+r<p.m && k0+c<p.k?16:0;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"::"r"(sm(As+r*40+c)),"l"(p.a+(size_t)(m0+r)*p.k+k0+c),"r"(sz));
      asm volatile("cp.async.ca.shared.global [%0], [%1], 16;"::"r"(sm(Bs+r*40+c)),"l"(p.b+(size_t)(n0+r)*p.k+k0+c));
    }
    asm volatile("cp.async.commit_group;"); asm volatile("cp.async.wait_group 0;"); __syncthreads();
    for(int kk=0;kk<32;kk+=16){
      uint32_t a[4];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];":"=r"(a[0]),"=r"(a[1]),"=r"(a[2]),"=r"(a[3]):"r"(sm(As+(warp*16+lane%16)*40+kk+lane/16*8)));
      #pragma unroll
      for(int j=0;j<8;j++){uint32_t b[2];
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1},[%2];":"=r"(b[0]),"=r"(b[1]):"r"(sm(Bs+(j*8+lane%8)*40+kk+(lane/8%2)*8)));
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};":"+f"(acc[j][0]),"+f"(acc[j][1]),"+f"(acc[j][2]),"+f"(acc[j][3]):"r"(a[0]),"r"(a[1]),"r"(a[2]),"r"(a[3]),"r"(b[0]),"r"(b[1]));
      }
    }
    __syncthreads();
  }
  for(int j=0;j<8;j++)for(int i=0;i<4;i++){int r=m0+warp*16+lane/4+i/2*8,c=n0+j*8+lane%4*2+i%2; if(r<p.m)p.c[(size_t)r*p.n+c]=acc[j][i]*p.cb[i];}
}
__constant__ float tab[16];
__device__ int counter;
extern "C" __global__ void quant(const __nv_bfloat16* x, uint8_t* q, float* am, const float* __restrict__ cb, long n, int bs){
  __shared__ float red[8];
  long i0=(long)blockIdx.x*bs; float m=0;
  for(int i=threadIdx.x;i<bs;i+=blockDim.x) if(i0+i<n) m=fmaxf(m,fabsf(__bfloat162float(x[i0+i])));
  for(int o=16;o;o>>=1) m=fmaxf(m,__shfl_xor_sync(~0u,m,o));
  if(threadIdx.x%32==0) red[threadIdx.x/32]=m; __syncthreads();
  for(int w=0;w<blockDim.x/32;w++) m=fmaxf(m,red[w]);
  if(threadIdx.x==0){am[blockIdx.x]=m; atomicAdd(&counter,1);}
  for(int i=threadIdx.x*2;i<bs;i+=2*blockDim.x){ int c[2];
    for(int e=0;e<2;e++){ float v=i0+i+e<n?__bfloat162float(x[i0+i+e])/m:0; int best=0; float bd=1e30f; for(int t=0;t<16;t++){float d=fabsf(cb[t]+tab[t]-v); if(d<bd){bd=d;best=t;}} c[e]=best;}
    if(i0+i<n) q[(i0+i)/2]=c[0]<<4|c[1]; }
}
extern "C" __global__ void misc(const float* x, __half* h, __nv_bfloat162* b, double* d, int n, unsigned long long* u, signed char* s8){
  int i=blockIdx.x*blockDim.x+threadIdx.x; if(i>=n) return;
  float v=x[i]; h[i]=__float2half(v); b[i]=__floats2bfloat162_rn(v,v*2); b[i]=__hfma2(b[i],b[i],b[i]); b[i]=__hadd2(b[i],b[i]);
  h[i]=__hmul(h[i],h[i]); h[i]=hexp(h[i]);
  d[i]=sqrt((double)v)+exp(v)+log(v)+sin(v)+pow(v,1.5f);
  u[i]=__umul64hi(u[i],u[i])/ (u[i]%7+1); s8[i]=(signed char)(v); 
  float loc[20]; for(int j=0;j<20;j++) loc[j]=v*j; d[i]+=loc[s8[i]&15];
  u[i]+=__popc(i)+__clz(i)+__ffs(i)+__brev(i)+__byte_perm(i,n,0x1234)+__funnelshift_l(i,n,i)+__dp4a(i,n,i)+ (i%n) + i/3;
  u[i]+=__ballot_sync(~0u,v>0)+__any_sync(~0u,v>1)+__match_any_sync(~0u,i)+__reduce_add_sync(~0u,i)+__activemask();
  atomicMax((int*)u,i); atomicCAS(u,1ull,2ull); atomicAdd(x?(float*)d:0,1.f);
  v = tanhf(v)+rsqrtf(v)+__expf(v)+__fdividef(v,3)+v/x[0]+floorf(v)+rintf(v)+ (int)v + __saturatef(v)+fmodf(v,3);
  d[i]*=v;
  switch(i&7){case 0:d[i]=1;break;case 1:d[i]=2;break;case 2:d[i]+=7;break;case 3: d[i]=x[2];break;case 4:s8[i]=1;break; case 5: return; case 6: u[2]=1;break;}
}
