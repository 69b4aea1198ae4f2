//! The same launch on a GPU, compared with what the emulator gave.
//!
//! Only with `PTX_EMULATOR_REPORT` set to a file: there every comparison adds a line of tab-separated fields, namely
//! `same`, `DIFFERENT` or `FAILED`; what ran; elements compared; elements that differ; the first of them, or why it failed.
//! Nothing panics: one run on a GPU is to find all differences.

use std::ffi::{CString, c_void};
use std::fs::OpenOptions;
use std::io::Write;
use std::sync::{Arc, OnceLock};
use std::{env, ptr};

use cudarc::driver::{CudaContext, sys};
use half::{bf16, f16};
use ptx_emulator::{Launch, Swizzle, TensorMap};

/// Memory of the emulator that a kernel uses.
pub struct Buffer<'a> {
    pub address: u64,
    pub before: &'a [u8],
    /// What the emulator left there.
    pub after: &'a [u8],
}

/// How results are compared.
#[derive(Clone, Copy)]
pub enum Compare {
    /// Elements of so many bytes, all their bits.
    Bits(usize),
    /// Elements of 8 bytes with an approximation in the low bits: f32, f16 or bf16, by a relative or absolute error.
    F32(f64),
    F16(f64),
    Bf16(f64),
    /// Not here.
    Elsewhere,
}

/// A launch that the emulator has done.
pub struct Case<'a> {
    pub name: &'a str,
    pub ptx: &'a str,
    pub entry: &'a str,
    pub launch: Launch,
    /// Bytes of the parameters; addresses of buffers and encoded maps in them are replaced.
    pub params: &'a [&'a [u8]],
    pub buffers: &'a [Buffer<'a>],
    pub maps: &'a [TensorMap],
    pub compare: Compare,
}

fn report_file() -> Option<std::path::PathBuf> {
    env::var_os("PTX_EMULATOR_REPORT").map(Into::into)
}

fn context() -> Result<&'static Arc<CudaContext>, String> {
    static CONTEXT: OnceLock<Result<Arc<CudaContext>, String>> = OnceLock::new();
    let context = CONTEXT.get_or_init(|| {
        // SAFETY: NVIDIA's driver library may be loaded at any time.
        if !unsafe { sys::is_culib_present() } {
            return Err("no NVIDIA driver".into());
        }
        CudaContext::new(0).map_err(|e| format!("{e:?}"))
    });
    context.as_ref().map_err(Clone::clone)
}

/// One line of the report.
pub fn report(verdict: &str, name: &str, elements: usize, different: usize, detail: &str) {
    let Some(path) = report_file() else { return };
    let flat = |text: &str| text.replace(['\t', '\n'], " ");
    let line = format!("{verdict}\t{}\t{elements}\t{different}\t{}\n", flat(name), flat(detail));
    let file = OpenOptions::new().create(true).append(true).open(&path);
    file.and_then(|mut f| f.write_all(line.as_bytes())).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

/// Runs a case on the GPU, if a report is wanted; what is in the buffers afterwards.
pub fn compare(case: &Case) -> Option<Vec<Vec<u8>>> {
    report_file()?;
    match run(case) {
        Ok(found) => {
            judge(case, &found);
            Some(found)
        }
        Err(reason) => {
            report("FAILED", case.name, 0, 0, &reason);
            None
        }
    }
}

fn judge(case: &Case, found: &[Vec<u8>]) {
    let (mut elements, mut different, mut first) = (0, 0, String::new());
    for (i, (buffer, found)) in case.buffers.iter().zip(found).enumerate() {
        let size = match case.compare {
            Compare::Bits(size) => size,
            Compare::Elsewhere => return,
            _ => 8,
        };
        for (at, (mine, theirs)) in buffer.after.chunks(size).zip(found.chunks(size)).enumerate() {
            elements += 1;
            if !equal(case.compare, mine, theirs) {
                if different == 0 {
                    // As many bytes of the first buffer belong to an element as there are for each.
                    let inputs = case.buffers[0].before;
                    let each = (inputs.len() * size / found.len()).max(1);
                    let input = inputs.chunks(each).nth(at).unwrap_or_default();
                    first = format!(
                        "buffer {i} element {at}: emulator {}, GPU {}; input there {}",
                        hex(mine),
                        hex(theirs),
                        hex(&input[..input.len().min(32)])
                    );
                }
                different += 1;
            }
        }
    }
    let verdict = if different == 0 { "same" } else { "DIFFERENT" };
    report(verdict, case.name, elements, different, &first);
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().map(|b| format!("{b:02x}")).collect()
}

fn equal(compare: Compare, mine: &[u8], theirs: &[u8]) -> bool {
    let half = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
    let single = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]) as f64;
    let near = |a: f64, b: f64, error: f64| {
        a == b || a.is_nan() && b.is_nan() || (a - b).abs() <= error * a.abs().max(b.abs()).max(1.0)
    };
    match compare {
        Compare::F32(error) => near(single(mine), single(theirs), error),
        Compare::F16(error) => {
            near(f16::from_bits(half(mine)).to_f64(), f16::from_bits(half(theirs)).to_f64(), error)
        }
        Compare::Bf16(error) => {
            near(bf16::from_bits(half(mine)).to_f64(), bf16::from_bits(half(theirs)).to_f64(), error)
        }
        _ => mine == theirs,
    }
}

/// How an instruction that is no exact one is compared, by the bounds of the PTX ISA document.
pub fn tolerance(body: &str, result: u32) -> Compare {
    let approximate = [".approx", "tanh", "ex2"].iter().any(|a| body.contains(a));
    if !approximate {
        return Compare::Bits(8);
    }
    // f32: the loosest are sin and cos with 2^-20.5 (on -pi to pi), and tanh with 2^-11.
    let error = if body.contains("tanh") { 2f64.powi(-10) } else { 2f64.powi(-20) };
    match (result, body.contains("bf16")) {
        (16, true) => Compare::Bf16(2f64.powi(-7)),
        (16, false) => Compare::F16(2f64.powi(-9)),
        (32, _) if body.contains("sin") || body.contains("cos") => Compare::Elsewhere,
        (32, _) => Compare::F32(error),
        _ => Compare::Elsewhere,
    }
}

fn check(result: sys::CUresult, what: &str) -> Result<(), String> {
    if result == sys::CUresult::CUDA_SUCCESS { Ok(()) } else { Err(format!("{what}: {result:?}")) }
}

fn load(ptx: &str) -> Result<sys::CUmodule, String> {
    let text = CString::new(ptx).map_err(|e| e.to_string())?;
    let mut log = vec![0u8; 4096];
    let mut options =
        [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    let mut values = [log.as_mut_ptr().cast::<c_void>(), ptr::without_provenance_mut(log.len())];
    let mut module = ptr::null_mut();
    // SAFETY: the text ends in a zero byte; there are two options, and the log has its stated size.
    let result = unsafe {
        sys::cuModuleLoadDataEx(
            &mut module,
            text.as_ptr().cast(),
            2,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    let written = log.iter().position(|&b| b == 0).unwrap_or(log.len());
    check(result, &format!("loading the PTX: {}", String::from_utf8_lossy(&log[..written])))?;
    Ok(module)
}

fn encode(map: &TensorMap, address: u64) -> Result<[u8; 128], String> {
    use sys::CUtensorMapDataType::*;
    use sys::CUtensorMapSwizzle::*;
    let element = match map.element_bytes {
        1 => CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2 => CU_TENSOR_MAP_DATA_TYPE_UINT16,
        4 => CU_TENSOR_MAP_DATA_TYPE_UINT32,
        _ => CU_TENSOR_MAP_DATA_TYPE_UINT64,
    };
    let swizzle = match map.swizzle {
        Swizzle::None => CU_TENSOR_MAP_SWIZZLE_NONE,
        Swizzle::Bytes32 => CU_TENSOR_MAP_SWIZZLE_32B,
        Swizzle::Bytes64 => CU_TENSOR_MAP_SWIZZLE_64B,
        Swizzle::Bytes128 => CU_TENSOR_MAP_SWIZZLE_128B,
    };
    let mut encoded = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: the arrays have as many items as there are dimensions (strides one fewer, element strides five).
    let result = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut encoded,
            element,
            map.dims.len() as u32,
            ptr::with_exposed_provenance_mut(address as usize),
            map.dims.as_ptr(),
            map.strides.as_ptr(),
            map.box_dims.as_ptr(),
            [1; 5].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    check(result, "cuTensorMapEncodeTiled")?;
    let mut bytes = [0; 128];
    for (out, word) in bytes.chunks_exact_mut(8).zip(encoded.opaque) {
        out.copy_from_slice(&word.to_le_bytes());
    }
    Ok(bytes)
}

/// The parameters with addresses and maps of the GPU.
fn translate(case: &Case, param: &[u8], addresses: &[u64]) -> Result<Vec<u8>, String> {
    let mut out = param.to_vec();
    let gpu = |address: u64| {
        let found = case
            .buffers
            .iter()
            .position(|b| (b.address..b.address + b.before.len().max(1) as u64).contains(&address));
        found.map(|i| addresses[i] + (address - case.buffers[i].address))
    };
    for at in (0..out.len().saturating_sub(7)).step_by(8) {
        let word = u64::from_le_bytes(out[at..at + 8].try_into().map_err(|_| "eight bytes")?);
        if let Some(address) = gpu(word) {
            out[at..at + 8].copy_from_slice(&address.to_le_bytes());
        }
    }
    for map in case.maps {
        let mine = map.encode()?;
        let address = gpu(map.address).ok_or("a map of no buffer")?;
        for at in (0..param.len().saturating_sub(127)).step_by(64) {
            if param[at..at + 128] == mine {
                out[at..at + 128].copy_from_slice(&encode(map, address)?);
            }
        }
    }
    Ok(out)
}

fn run(case: &Case) -> Result<Vec<Vec<u8>>, String> {
    let context = context()?;
    context.bind_to_thread().map_err(|e| format!("{e:?}"))?;
    // What is for every GPU may use all that this one has: some forms of instructions came later than others.
    let (major, minor) = context.compute_capability().map_err(|e| format!("{e:?}"))?;
    let module = load(&case.ptx.replacen(".target sm_80\n", &format!(".target sm_{major}{minor}\n"), 1))?;
    let mut addresses = Vec::new();
    for buffer in case.buffers {
        let mut address = 0;
        // SAFETY: the context is current; the copy stays inside of what was just allocated.
        unsafe {
            check(sys::cuMemAlloc_v2(&mut address, buffer.before.len().max(16)), "cuMemAlloc")?;
            if !buffer.before.is_empty() {
                let copied =
                    sys::cuMemcpyHtoD_v2(address, buffer.before.as_ptr().cast(), buffer.before.len());
                check(copied, "copying to the GPU")?;
            }
        }
        addresses.push(address);
    }
    let params = case.params.iter().map(|p| translate(case, p, &addresses)).collect::<Result<Vec<_>, _>>()?;
    let mut pointers: Vec<*mut c_void> = params.iter().map(|p| p.as_ptr().cast_mut().cast()).collect();
    let name = CString::new(case.entry).map_err(|e| e.to_string())?;
    let mut function = ptr::null_mut();
    let ([gx, gy, gz], [bx, by, bz], shared) =
        (case.launch.grid, case.launch.block, case.launch.dynamic_shared);
    // SAFETY: the function is of the loaded module, and its parameters are those that the emulator took; it was found to
    // stay inside of its buffers there.
    unsafe {
        check(sys::cuModuleGetFunction(&mut function, module, name.as_ptr()), case.entry)?;
        let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        check(sys::cuFuncSetAttribute(function, most, shared as i32), "shared memory")?;
        let arguments = pointers.as_mut_ptr();
        let launched = sys::cuLaunchKernel(
            function,
            gx,
            gy,
            gz,
            bx,
            by,
            bz,
            shared,
            ptr::null_mut(),
            arguments,
            ptr::null_mut(),
        );
        check(launched, "the launch")?;
        check(sys::cuCtxSynchronize(), "the kernel")?;
    }
    let mut found = Vec::new();
    for (buffer, &address) in case.buffers.iter().zip(&addresses) {
        let mut out = vec![0u8; buffer.after.len()];
        // SAFETY: as many bytes as were allocated; the kernel has ended.
        unsafe {
            if !out.is_empty() {
                let copied = sys::cuMemcpyDtoH_v2(out.as_mut_ptr().cast(), address, out.len());
                check(copied, "copying from the GPU")?;
            }
            check(sys::cuMemFree_v2(address), "cuMemFree")?;
        }
        found.push(out);
    }
    // SAFETY: nothing of the module runs any more.
    check(unsafe { sys::cuModuleUnload(module) }, "cuModuleUnload")?;
    Ok(found)
}
