//! What is special to sm_90a: clusters, transaction barriers, bulk and tensor copies, warpgroup products, launches that
//! overlap.

// Tables of shapes and places.
#![allow(clippy::type_complexity)]

mod common;
use common::{gpu, random};
use half::{bf16, f16};
use ptx_emulator::{Fault, FaultKind, Gpu, Launch, Module, Spec, Swizzle, TensorMap};

const PTX: &str = include_str!("kernels/hopper.ptx");

fn module() -> Module {
    Module::parse("hopper", PTX).unwrap()
}

/// The same launch on a GPU, where a report of that is wanted. Buffers: address, what was in it, whether the kernel writes.
fn second_opinion(
    gpu: &Gpu,
    name: &str,
    entry: &str,
    launch: &Launch,
    params: &[&[u8]],
    buffers: &[(u64, &[u8], bool)],
    maps: &[TensorMap],
) {
    let after: Vec<Vec<u8>> = buffers
        .iter()
        .map(|&(address, before, writes)| {
            let mut out = before.to_vec();
            if writes {
                gpu.read_unchecked(address, &mut out).unwrap();
            }
            out
        })
        .collect();
    let buffers: Vec<gpu::Buffer> = buffers
        .iter()
        .zip(&after)
        .map(|(&(address, before, _), after)| gpu::Buffer { address, before, after })
        .collect();
    let (ptx, launch, compare) = (PTX, *launch, gpu::Compare::Bits(4));
    gpu::compare(&gpu::Case { name, ptx, entry, launch, params, buffers: &buffers, maps, compare });
}

fn upload(gpu: &Gpu, label: &str, bytes: &[u8]) -> u64 {
    let address = gpu.alloc(bytes.len(), label).unwrap();
    gpu.write(address, bytes).unwrap();
    address
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn floats(gpu: &Gpu, address: u64, count: usize) -> Vec<f32> {
    let mut out = vec![0; 4 * count];
    gpu.read(address, &mut out).unwrap();
    out.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Small numbers whose products and sums are exact.
fn small(count: usize, seed: u64) -> Vec<f32> {
    random(count, seed).map(|v| (v % 33) as f32 - 16.0).collect()
}

/// How a matrix of 16-bit elements lies in shared memory, as the PTX ISA draws it: by element, before the swizzle.
struct Image {
    /// Bytes of a line of the swizzle's pattern: 16 without one.
    width: usize,
    leading: usize,
    stride: usize,
    /// The K index is not the fastest.
    transposed: bool,
}

impl Image {
    /// A dense one for `rows` times 16, and its size.
    fn new(layout: usize, transposed: bool, rows: usize) -> (Image, usize) {
        let width = [16, 128, 64, 32][layout];
        let image = match (layout, transposed) {
            // Core matrices of 8 x 16 bytes: along K first, then along the rows; or the other way round.
            (0, _) => Image {
                width,
                leading: if transposed { 128 * (rows / 8) } else { 128 },
                stride: if transposed { 128 } else { 256 },
                transposed,
            },
            (_, false) => Image { width, leading: 16, stride: 8 * width, transposed },
            // Patterns of `width` bytes along the rows and 8 along K.
            (_, true) => {
                let patterns = (2 * rows).div_ceil(width);
                Image { width, leading: 8 * width, stride: 8 * width * patterns, transposed }
            }
        };
        let size = match (layout, transposed) {
            (0, _) => 32 * rows,
            (_, false) => width * rows,
            (_, true) => image.stride * 2,
        };
        (image, size)
    }

    fn place(&self, row: usize, k: usize) -> usize {
        let plain = match (self.width, self.transposed) {
            (16, false) => row / 8 * self.stride + k / 8 * self.leading + row % 8 * 16 + k % 8 * 2,
            (16, true) => row / 8 * self.stride + k / 8 * self.leading + k % 8 * 16 + row % 8 * 2,
            (w, false) => row / 8 * self.stride + row % 8 * w + 2 * k,
            (w, true) => 2 * row / w * self.leading + 2 * row % w + k % 8 * w + k / 8 * self.stride,
        };
        // Bits 4 and up are flipped by as many bits from 7 on.
        let bits = self.width / 16 - 1;
        plain ^ (plain >> 3 & bits << 4)
    }

    fn fill(&self, size: usize, rows: usize, element: impl Fn(usize, usize) -> u16) -> Vec<u8> {
        let mut out = vec![0; size];
        for row in 0..rows {
            for k in 0..16 {
                out[self.place(row, k)..][..2].copy_from_slice(&element(row, k).to_le_bytes());
            }
        }
        out
    }
}

#[allow(clippy::too_many_arguments)]
fn run_tile(
    kernel: &str,
    (a, a_image, a_layout): (&[u8], &Image, usize),
    (b, b_image, b_layout): (&[u8], &Image, usize),
    sums: usize,
) -> Vec<f32> {
    let gpu = Gpu::new(Spec::h200());
    let (pa, pb) = (upload(&gpu, "a", a), upload(&gpu, "b", b));
    let y = gpu.alloc(4 * sums, "y").unwrap();
    let mut params: Vec<u8> = [pa, pb, y].iter().flat_map(|p| p.to_le_bytes()).collect();
    let numbers = [
        a.len(),
        b.len(),
        a_image.leading,
        a_image.stride,
        a_layout,
        b_image.leading,
        b_image.stride,
        b_layout,
        0,
        0,
    ];
    params.extend(numbers.iter().flat_map(|&n| (n as u32).to_le_bytes()));
    let launch = Launch { dynamic_shared: 32768, ..Launch::linear(1, 128) };
    let counters = gpu
        .launch(&module(), kernel, &launch, &[&params])
        .unwrap_or_else(|fault| panic!("{kernel}: {fault}"));
    let zeros = vec![0; 4 * sums];
    let name = format!("{kernel}, layouts {a_layout} and {b_layout}");
    let buffers = [(pa, a, false), (pb, b, false), (y, &zeros[..], true)];
    second_opinion(&gpu, &name, kernel, &launch, &[&params], &buffers, &[]);
    assert!(counters.matrix_ops > 0 && counters.async_bytes == (a.len() + b.len()) as u64);
    floats(&gpu, y, sums)
}

#[test]
fn wgmma_reads_every_layout_of_its_operands() {
    let (a, b) = (small(64 * 16, 1), small(16 * 16, 2));
    let wanted: Vec<f32> =
        (0..64 * 16).map(|i| (0..16).map(|k| a[i / 16 * 16 + k] * b[i % 16 * 16 + k]).sum()).collect();
    let half = |v: f32| bf16::from_f32(v).to_bits();
    for (kernel, ta, tb) in [
        ("tile_nn", false, false),
        ("tile_nt", false, true),
        ("tile_tn", true, false),
        ("tile_tt", true, true),
    ] {
        for a_layout in 0..4 {
            for b_layout in 0..4 {
                let (ia, a_size) = Image::new(a_layout, ta, 64);
                let (ib, b_size) = Image::new(b_layout, tb, 16);
                let image_a = ia.fill(a_size, 64, |r, k| half(a[r * 16 + k]));
                let image_b = ib.fill(b_size, 16, |r, k| half(b[r * 16 + k]));
                let got = run_tile(kernel, (&image_a, &ia, a_layout), (&image_b, &ib, b_layout), 64 * 16);
                assert_eq!(got, wanted, "{kernel} layouts {a_layout} {b_layout}");
            }
        }
    }
    let plain: Vec<u8> = a.iter().flat_map(|&v| half(v).to_le_bytes()).collect();
    let (ia, _) = Image::new(0, false, 64);
    for layout in 0..4 {
        let (ib, size) = Image::new(layout, false, 16);
        let image = ib.fill(size, 16, |r, k| half(b[r * 16 + k]));
        assert_eq!(run_tile("tile_registers", (&plain, &ia, 0), (&image, &ib, layout), 64 * 16), wanted);
    }
}

#[test]
fn wgmma_negates_and_sums_in_f16() {
    let (a, b) = (small(64 * 16, 3), small(8 * 16, 4));
    let half = |v: f32| f16::from_f32(v).to_bits();
    let (ia, a_size) = Image::new(0, false, 64);
    let (ib, b_size) = Image::new(0, false, 8);
    let image_a = ia.fill(a_size, 64, |r, k| half(a[r * 16 + k]));
    let image_b = ib.fill(b_size, 8, |r, k| half(b[r * 16 + k]));
    let got = run_tile("tile_f16", (&image_a, &ia, 0), (&image_b, &ib, 0), 64 * 4);
    let got: Vec<f32> = got
        .iter()
        .flat_map(|v| [v.to_bits() as u16, (v.to_bits() >> 16) as u16])
        .map(|h| f16::from_bits(h).to_f32())
        .collect();
    for (i, got) in got.iter().enumerate() {
        let sum: f32 = (0..16).map(|k| a[i / 8 * 16 + k] * b[i % 8 * 16 + k]).sum();
        assert_eq!(*got, f16::from_f32(1.0 - sum).to_f32(), "{i}");
    }
}

fn map(address: u64, dims: &[u64], box_dims: &[u32], swizzle: Swizzle) -> TensorMap {
    let mut strides = Vec::new();
    let mut stride = 2;
    for &dim in &dims[..dims.len() - 1] {
        stride = (stride * dim).next_multiple_of(16);
        strides.push(stride);
    }
    TensorMap {
        address,
        element_bytes: 2,
        dims: dims.to_vec(),
        strides,
        box_dims: box_dims.to_vec(),
        swizzle,
        fill_nan: false,
    }
}

#[test]
fn a_product_with_tensor_maps_and_a_producer_warp() {
    // Tails in every direction: rows and columns behind the end are zero, or not stored.
    for (m, n, k) in [(64, 16, 64), (128, 40, 72), (64, 24, 512)] {
        let (a, b) = (small(m * k, 5), small(n * k, 6));
        let half = |v: &[f32]| {
            v.iter().flat_map(|&v| bf16::from_f32(v).to_bits().to_le_bytes()).collect::<Vec<u8>>()
        };
        let gpu = Gpu::new(Spec::h200());
        let (pa, pb) = (upload(&gpu, "a", &half(&a)), upload(&gpu, "b", &half(&b)));
        let c = gpu.alloc(4 * m * n, "c").unwrap();
        let mut params = Vec::new();
        let maps = [
            map(pa, &[k as u64, m as u64], &[64, 64], Swizzle::Bytes128),
            map(pb, &[k as u64, n as u64], &[64, 16], Swizzle::Bytes128),
        ];
        maps.iter().for_each(|map| params.extend(map.encode().unwrap()));
        params.extend(c.to_le_bytes());
        params.extend([n as u32, k as u32].iter().flat_map(|v| v.to_le_bytes()));
        params.resize(320, 0);
        let launch = Launch {
            grid: [n.div_ceil(16) as u32, m as u32 / 64, 1],
            block: [384, 1, 1],
            dynamic_shared: 4 * 16384,
            ..Launch::linear(1, 1)
        };
        gpu.launch(&module(), "product_pipeline", &launch, &[&params])
            .unwrap_or_else(|fault| panic!("{fault}"));
        let (a_bytes, b_bytes, zeros) = (half(&a), half(&b), vec![0; 4 * m * n]);
        let buffers = [(pa, &a_bytes[..], false), (pb, &b_bytes, false), (c, &zeros, true)];
        let name = format!("product_pipeline {m} x {n} x {k}");
        second_opinion(&gpu, &name, "product_pipeline", &launch, &[&params], &buffers, &maps);
        let got = floats(&gpu, c, m * n);
        for i in 0..m * n {
            let wanted: f32 = (0..k).map(|l| a[i / n * k + l] * b[i % n * k + l]).sum();
            assert_eq!(got[i], wanted, "{m} {n} {k}: {i}");
        }
    }
}

#[test]
fn tensor_maps_copy_boxes_both_ways() {
    // Tensors of 1 to 3 dimensions; boxes that stick out at each end.
    let cases: &[(&[u64], &[u32], &[[i32; 3]], Swizzle)] = &[
        (&[200], &[64], &[[0, 0, 0], [136, 0, 0], [-8, 0, 0], [190, 0, 0], [500, 0, 0]], Swizzle::None),
        (&[40, 20], &[16, 8], &[[0, 0, 0], [24, 16, 0], [-3, -2, 0], [35, 18, 0]], Swizzle::None),
        (&[40, 20], &[16, 16], &[[8, 2, 0], [32, 10, 0]], Swizzle::Bytes32),
        (&[40, 20], &[32, 16], &[[0, 0, 0], [16, -5, 0]], Swizzle::Bytes64),
        (&[72, 40], &[64, 16], &[[0, 0, 0], [-5, 30, 0]], Swizzle::Bytes128),
        (&[24, 6, 5], &[16, 4, 3], &[[0, 0, 0], [16, 4, 3], [-1, -1, -1]], Swizzle::Bytes32),
    ];
    for (dims, box_dims, places, swizzle) in cases {
        let gpu = Gpu::new(Spec::h200());
        let bytes_of = |m: &TensorMap| {
            2 * dims[0] as usize
                + m.strides
                    .iter()
                    .zip(&dims[1..])
                    .map(|(s, d)| *s as usize * (*d as usize - 1))
                    .sum::<usize>()
        };
        let shape = map(0, dims, box_dims, *swizzle);
        let data: Vec<u8> = random(bytes_of(&shape), 8).map(|v| v as u8).collect();
        let from = upload(&gpu, "from", &data);
        for place in *places {
            let to = upload(&gpu, "to", &vec![0xee; data.len()]);
            let size = 2 * box_dims.iter().product::<u32>() as usize;
            let y = gpu.alloc(size, "y").unwrap();
            let mut params = Vec::new();
            let maps =
                [TensorMap { address: from, ..shape.clone() }, TensorMap { address: to, ..shape.clone() }];
            maps.iter().for_each(|map| params.extend(map.encode().unwrap()));
            params.extend(y.to_le_bytes());
            params.extend([size as i32, place[0], place[1], place[2]].iter().flat_map(|v| v.to_le_bytes()));
            params.resize(320, 0);
            let launch = Launch { dynamic_shared: size as u32, ..Launch::linear(1, 64) };
            let entry = format!("box{}", dims.len());
            gpu.launch(&module(), &entry, &launch, &[&params]).unwrap_or_else(|fault| panic!("{fault}"));
            let (zeros, old) = (vec![0; size], vec![0xee; data.len()]);
            let buffers = [(from, &data[..], false), (to, &old, true), (y, &zeros, true)];
            let name = format!("{entry}: {dims:?} {box_dims:?} {swizzle:?} at {place:?}");
            second_opinion(&gpu, &name, &entry, &launch, &[&params], &buffers, &maps);
            let (mut got, mut stored) = (vec![0; size], vec![0; data.len()]);
            gpu.read(y, &mut got).unwrap();
            gpu.read(to, &mut stored).unwrap();
            let mut wanted_stored = vec![0xee; data.len()];
            let bits = [0, 1, 3, 7][*swizzle as usize];
            for i in 0..size / 2 {
                let (mut rest, mut inside, mut at) = (i, true, 0);
                for d in 0..dims.len() {
                    let index = place[d] as i64 + (rest % box_dims[d] as usize) as i64;
                    rest /= box_dims[d] as usize;
                    inside &= index >= 0 && index < dims[d] as i64;
                    at += index * if d == 0 { 2 } else { shape.strides[d - 1] as i64 };
                }
                let plain = 2 * i;
                let lies = plain ^ (plain >> 3 & bits << 4);
                let value =
                    if inside { u16::from_le_bytes([data[at as usize], data[at as usize + 1]]) } else { 0 };
                assert_eq!(got[lies..lies + 2], value.to_le_bytes(), "{dims:?} {place:?} element {i}");
                if inside {
                    wanted_stored[at as usize..][..2].copy_from_slice(&value.wrapping_mul(2).to_le_bytes());
                }
            }
            assert!(stored == wanted_stored, "{dims:?} {place:?}");
        }
    }
}

#[test]
fn tensor_maps_that_a_driver_would_refuse() {
    let good = map(0x1000, &[64, 64], &[64, 8], Swizzle::Bytes128);
    good.encode().unwrap();
    let bad = |change: &dyn Fn(&mut TensorMap), says: &str| {
        let mut m = good.clone();
        change(&mut m);
        let error = m.encode().unwrap_err();
        assert!(error.contains(says), "{error}");
    };
    bad(&|m| m.address = 0x1008, "multiple of 16");
    bad(&|m| m.strides[0] = 136, "strides");
    bad(&|m| m.strides.clear(), "0 strides");
    bad(&|m| m.box_dims[1] = 257, "1 to 256");
    bad(&|m| m.box_dims[0] = 65, "multiple of 16");
    bad(&|m| m.box_dims[0] = 128, "swizzle of 128");
    bad(&|m| m.dims[1] = 0, "dimensions");
    bad(&|m| m.element_bytes = 3, "3 bytes");
}

#[test]
fn blocks_of_a_cluster_reach_each_other() {
    let gpu = Gpu::new(Spec::h200());
    let x = small(8 * 64, 9);
    let (px, y) = (upload(&gpu, "x", &bytes(&x)), gpu.alloc(4 * 5 * 8 * 64, "y").unwrap());
    gpu.launch(&module(), "cluster_sums", &Launch::linear(8, 64), &[&px.to_le_bytes(), &y.to_le_bytes()])
        .unwrap_or_else(|fault| panic!("{fault}"));
    let (data, zeros) = (bytes(&x), vec![0; 4 * 5 * 8 * 64]);
    let buffers = [(px, &data[..], false), (y, &zeros[..], true)];
    let params: [&[u8]; 2] = [&px.to_le_bytes(), &y.to_le_bytes()];
    second_opinion(&gpu, "cluster_sums", "cluster_sums", &Launch::linear(8, 64), &params, &buffers, &[]);
    for (i, got) in floats(&gpu, y, 5 * 8 * 64).chunks_exact(5).enumerate() {
        let first = i / 256 * 256 + i % 64;
        let sum: f32 = (0..4).map(|r| x[first + 64 * r]).sum();
        assert_eq!(got, [sum, sum, sum, sum, x[first + 128] + 2000.0], "thread {i}");
    }
    // The grid must be a whole number of clusters.
    let fault =
        gpu.launch(&module(), "cluster_sums", &Launch::linear(6, 64), &[&px.to_le_bytes(), &y.to_le_bytes()]);
    assert!(fault.unwrap_err().message.contains("does not divide"));
}

#[test]
fn multicasts_arrive_in_every_block() {
    let gpu = Gpu::new(Spec::h200());
    let x = small(4 * 32, 10);
    let (px, y) = (upload(&gpu, "x", &bytes(&x)), gpu.alloc(4 * 4 * 32, "y").unwrap());
    let counters = gpu
        .launch(&module(), "multicast", &Launch::linear(4, 32), &[&px.to_le_bytes(), &y.to_le_bytes()])
        .unwrap_or_else(|fault| panic!("{fault}"));
    let (data, zeros) = (bytes(&x), vec![0; 4 * 4 * 32]);
    let buffers = [(px, &data[..], false), (y, &zeros[..], true)];
    let params: [&[u8]; 2] = [&px.to_le_bytes(), &y.to_le_bytes()];
    second_opinion(&gpu, "multicast", "multicast", &Launch::linear(4, 32), &params, &buffers, &[]);
    let got = floats(&gpu, y, 4 * 32);
    assert!((0..128).all(|i| got[i] == x[i / 64 * 64 + i % 32]));
    assert_eq!(counters.global_loads.bytes, 2 * 128);
}

#[test]
fn copies_arrive_at_barriers() {
    let gpu = Gpu::new(Spec::h200());
    let x = small(3 * 64, 11);
    let (px, y) = (upload(&gpu, "x", &bytes(&x)), gpu.alloc(4 * 3 * 64, "y").unwrap());
    gpu.launch(&module(), "arrivals", &Launch::linear(3, 64), &[&px.to_le_bytes(), &y.to_le_bytes()])
        .unwrap_or_else(|fault| panic!("{fault}"));
    let (data, zeros) = (bytes(&x), vec![0; 4 * 3 * 64]);
    let buffers = [(px, &data[..], false), (y, &zeros[..], true)];
    let params: [&[u8]; 2] = [&px.to_le_bytes(), &y.to_le_bytes()];
    second_opinion(&gpu, "arrivals", "arrivals", &Launch::linear(3, 64), &params, &buffers, &[]);
    let got = floats(&gpu, y, 3 * 64);
    assert!((0..192).all(|i| got[i] == 2.0 * x[i / 64 * 64 + 63 - i % 64]));
}

fn link(gpu: &Gpu, x: u64, w: u64, y: u64, waits: u32, overlap: bool) -> Result<(), Box<Fault>> {
    let launch = Launch { overlap, ..Launch::linear(2, 32) };
    let args: [&[u8]; 4] = [&x.to_le_bytes(), &w.to_le_bytes(), &y.to_le_bytes(), &waits.to_le_bytes()];
    gpu.launch(&module(), "link", &launch, &args).map(drop)
}

#[test]
fn overlapping_launches_wait_before_they_read() {
    let early = |result: Result<(), Box<Fault>>, says: &str| {
        let fault = result.unwrap_err();
        assert!(fault.kind == FaultKind::EarlyAccess && fault.message.contains(says), "{fault}");
    };
    let gpu = Gpu::new(Spec::h200());
    let zeros = vec![0; 256];
    let [a, b, c, d] = ["a", "b", "c", "d"].map(|name| upload(&gpu, name, &zeros));
    link(&gpu, a, b, c, 1, false).unwrap();
    link(&gpu, c, b, d, 1, true).unwrap();
    // Reads what the launch before wrote: its x without a wait, or its w even before the wait.
    early(link(&gpu, d, b, a, 0, true), "of `d`");
    link(&gpu, a, b, c, 1, false).unwrap();
    early(link(&gpu, a, c, d, 1, true), "of `c`");
    // Without overlap nothing is early.
    link(&gpu, a, b, c, 1, false).unwrap();
    link(&gpu, c, c, d, 0, false).unwrap();
    // Overwrites what the launch before still reads.
    link(&gpu, a, b, c, 1, false).unwrap();
    early(
        link(&gpu, b, b, a, 0, true),
        "write of byte 0 of `a`, which the launch before may still read or write",
    );
    // A launch that lets the next one start without having waited leaves that one its own dependencies.
    link(&gpu, a, b, c, 1, false).unwrap();
    link(&gpu, b, b, d, 0, true).unwrap();
    early(link(&gpu, b, c, a, 1, true), "of `c`");
    link(&gpu, a, b, c, 1, false).unwrap();
    link(&gpu, b, b, d, 1, true).unwrap();
    link(&gpu, b, c, a, 1, true).unwrap();
    // A copy by the host waits for everything.
    link(&gpu, a, b, c, 1, false).unwrap();
    gpu.write(d, &zeros).unwrap();
    link(&gpu, c, b, d, 0, true).unwrap();
}
