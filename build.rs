//! Turns `kernels/*.cu` into PTX, once per target where that makes a difference, and embeds it, compressed. Nothing else.
//!
//! * `kernels/prebuilt` is used when its MANIFEST carries the hash of the sources and flags at hand.
//! * Otherwise nvcc is looked for: `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `PATH`, `/usr/local/cuda`, `target/cuda-toolchain`.
//! * Where there is none and `LORA_KERNELS_INSTALL_NVCC` is set (`.cargo/config.toml` sets it for builds inside the
//!   repository), nvcc is installed into `target/cuda-toolchain` from NVIDIA's Python packages.
//! * Otherwise no kernel is embedded: the CPU path works, and CUDA calls say why they do not.
//!
//! `LORA_KERNELS_PTX=compile` passes over the prebuilt files.
//!
//! A file of compressed PTX (`.ptx.z`, in `OUT_DIR/ptx` and in `kernels/prebuilt`) begins with the two lines that name version
//! and target. What follows is the rest of the text, compressed by zlib; nothing, where it is that of the first target.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::thread;

use miniz_oxide::deflate::compress_to_vec_zlib;
use sha2::{Digest, Sha256};

type Result<T> = std::result::Result<T, String>;

/// A virtual architecture, and the PTX version that is written into its modules. nvcc writes its own, newest version
/// although the code needs no more than this one; the lower stamp lets drivers from R525 on load it.
struct Target {
    name: &'static str,
    variant: &'static str,
    ptx_version: (u32, u32),
}

const TARGETS: [Target; 2] = [
    Target { name: "compute_80", variant: "Compute80", ptx_version: (7, 4) },
    Target { name: "compute_90a", variant: "Compute90a", ptx_version: (8, 0) },
];

const FLAGS: [&str; 7] =
    ["-ptx", "-std=c++17", "-O3", "-lineinfo", "-Werror", "all-warnings", "-Ikernels/include"];

/// The last toolkit whose PTX assembler and drivers (R580) are everywhere.
const TOOLCHAIN: [&str; 5] = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
];

fn main() -> ExitCode {
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "LORA_KERNELS_PTX", "LORA_KERNELS_INSTALL_NVCC"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let sources = Sources::read(Path::new("kernels"))?;
    let (origin, folder) = if let Some(prebuilt) = sources.prebuilt() {
        ("kernels/prebuilt".to_owned(), Some(prebuilt))
    } else {
        match find_nvcc(&target_folder(&out)) {
            Ok(nvcc) => {
                let version = run(Command::new(&nvcc).arg("--version"))?;
                println!("compiling with {}", nvcc.display());
                (format!("nvcc {}", release(&version)), Some(compile(&nvcc, &version, &sources, &out)?))
            }
            Err(reason) => {
                println!("cargo:warning=no CUDA kernels in this build: {reason}");
                (format!("none: {reason}"), None)
            }
        }
    };
    println!("PTX from {origin}");
    write(&out.join("modules.rs"), &modules_rs(&sources, folder.as_deref(), &origin)?)
}

/// The folder that holds `debug` and `release` (or, with `--target`, the triple's folder).
fn target_folder(out: &Path) -> PathBuf {
    out.ancestors().nth(4).expect("OUT_DIR is target/PROFILE/build/NAME-HASH/out").to_owned()
}

/// The kernels as they lie on disk.
struct Sources {
    /// File names of `kernels/*.cu` without the extension, sorted.
    modules: Vec<String>,
    /// Those that ask for the architecture, or include what does. The others are the same for all targets.
    of_each_target: BTreeSet<String>,
    /// Hash of everything in `kernels/include`, and of this file.
    common: String,
}

impl Sources {
    fn read(folder: &Path) -> Result<Self> {
        let named = |path: &PathBuf| path.extension() == Some(OsStr::new("cu"));
        let stem = |path: PathBuf| path.file_stem().expect("has an extension").to_string_lossy().into_owned();
        let modules: Vec<String> = list(folder)?.into_iter().filter(named).map(stem).collect();
        let mut of_each_target = BTreeSet::new();
        for module in &modules {
            let file = folder.join(format!("{module}.cu"));
            if asks_for_architecture(&file, &folder.join("include"), &mut BTreeSet::new())? {
                of_each_target.insert(module.clone());
            }
        }
        let mut hash = Sha256::new();
        hash_file(&mut hash, Path::new("build.rs"))?;
        for header in list(&folder.join("include"))? {
            hash_file(&mut hash, &header)?;
        }
        Ok(Self { modules, of_each_target, common: hex(hash) })
    }

    /// What the PTX of one module depends on, apart from nvcc itself.
    fn hash_module(&self, module: &str, target: &Target) -> Result<String> {
        let mut hash = Sha256::new();
        hash.update(format!("{} {}\n", self.common, target.name));
        hash_file(&mut hash, &Path::new("kernels").join(format!("{module}.cu")))?;
        Ok(hex(hash))
    }

    /// `kernels/prebuilt`, if every module in it is the current one.
    fn prebuilt(&self) -> Option<PathBuf> {
        let folder = Path::new("kernels/prebuilt");
        let wanted = env::var_os("LORA_KERNELS_PTX").is_none_or(|value| value != "compile");
        let manifest = fs::read_to_string(folder.join("MANIFEST")).ok()?;
        let current = self.manifest().ok()?;
        (wanted && manifest == current).then(|| fs::canonicalize(folder).expect("it holds MANIFEST"))
    }

    /// One line per PTX file: hash of what it was made from, file name.
    fn manifest(&self) -> Result<String> {
        let mut text = String::new();
        for (module, target) in self.files() {
            let _ = writeln!(text, "{}  {}", self.hash_module(module, target)?, ptx_name(module, target));
        }
        Ok(text)
    }

    fn files(&self) -> impl Iterator<Item = (&String, &'static Target)> {
        self.modules.iter().flat_map(|module| TARGETS.iter().map(move |target| (module, target)))
    }
}

/// Whether a source, or what it includes and `seen` has not, looks at `__CUDA_ARCH__` and its like.
fn asks_for_architecture(source: &Path, include: &Path, seen: &mut BTreeSet<PathBuf>) -> Result<bool> {
    let text = read(source)?;
    if text.contains("__CUDA_ARCH") {
        return Ok(true);
    }
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"')) {
            let header = include.join(name);
            if seen.insert(header.clone()) && asks_for_architecture(&header, include, seen)? {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

fn ptx_name(module: &str, target: &Target) -> String {
    format!("{module}.{}.ptx", target.name)
}

fn compressed_name(module: &str, target: &Target) -> String {
    format!("{}.z", ptx_name(module, target))
}

/// The code that `src/cuda/image.rs` includes.
fn modules_rs(sources: &Sources, folder: Option<&Path>, origin: &str) -> Result<String> {
    let mut images = String::new();
    for (folder, (module, target)) in
        folder.iter().flat_map(|folder| sources.files().map(move |file| (folder, file)))
    {
        let path = folder.join(compressed_name(module, target));
        let bytes = fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let (header, body) = bytes.split_at(header_len(&bytes));
        let header = String::from_utf8_lossy(header);
        let from = if body.is_empty() { folder.join(compressed_name(module, &TARGETS[0])) } else { path };
        let variant = target.variant;
        let _ = writeln!(
            images,
            "    Image {{ module: {module:?}, target: Target::{variant}, header: {header:?}, file: include_bytes!({from:?}) }},"
        );
    }
    Ok(format!("const ORIGIN: &str = {origin:?};\nstatic MODULES: &[Image] = &[\n{images}];\n"))
}

/// The length of the two lines before the compressed text.
fn header_len(bytes: &[u8]) -> usize {
    bytes.splitn(3, |&byte| byte == b'\n').take(2).map(|line| line.len() + 1).sum()
}

/// The lines of a PTX text that name its version and its target, and the text without them.
fn take_header(ptx: &str) -> (String, String) {
    let named = |line: &&str| line.starts_with(".version ") || line.starts_with(".target ");
    let (header, body): (Vec<_>, Vec<_>) = ptx.lines().partition(named);
    let text = |lines: Vec<&str>| lines.iter().map(|line| format!("{line}\n")).collect();
    (text(header), text(body))
}

/// Compiles what is not in the cache, and collects everything in `OUT_DIR/ptx` with a manifest.
fn compile(nvcc: &Path, version: &str, sources: &Sources, out: &Path) -> Result<PathBuf> {
    let cache = target_folder(out).join("kernel-cache");
    let folder = out.join("ptx");
    let _ = fs::remove_dir_all(&folder);
    create_dir(&folder)?;
    create_dir(&cache)?;
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1usize).clamp(1, 8);
    let is_compiled = |(module, target): &(&String, &Target)| {
        target.name == TARGETS[0].name || sources.of_each_target.contains(*module)
    };
    let queue = Mutex::new(sources.files().filter(is_compiled));
    let errors = Mutex::new(String::new());
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().expect("no thread panics").next();
                    let Some((module, target)) = next else { break };
                    if let Err(error) =
                        compile_module(nvcc, version, sources, module, target, &cache, &folder)
                    {
                        errors.lock().expect("no thread panics").push_str(&error);
                    }
                }
            });
        }
    });
    let errors = errors.into_inner().expect("no thread panics");
    if !errors.is_empty() {
        return Err(errors);
    }
    for (module, target) in sources.files().filter(|file| !is_compiled(file)) {
        write_twin(module, target, &folder)?;
    }
    write(&folder.join("MANIFEST"), &sources.manifest()?)?;
    write(&folder.join("NVCC"), &nvcc.to_string_lossy())?;
    Ok(folder)
}

fn compile_module(
    nvcc: &Path,
    version: &str,
    sources: &Sources,
    module: &str,
    target: &Target,
    cache: &Path,
    folder: &Path,
) -> Result<()> {
    let key = hex(Sha256::new_with_prefix(version).chain_update(sources.hash_module(module, target)?));
    let cached = cache.join(format!("{module}.{key}.ptx"));
    let output = folder.join(ptx_name(module, target));
    if !cached.exists() {
        // The source is named relative to the repository, so that no path of this machine gets into the PTX.
        let arch = format!("-gencode=arch={0},code={0}", target.name);
        let source = format!("kernels/{module}.cu");
        run(Command::new(nvcc).args(FLAGS).arg(arch).arg("-o").arg(&output).arg(source))?;
        let partial = cache.join(format!("{module}.{key}.{}", std::process::id()));
        write(&partial, &finish(&read(&output)?, target))?;
        fs::rename(&partial, &cached).map_err(|e| format!("{}: {e}", cached.display()))?;
    }
    let ptx = read(&cached)?;
    write(&output, &ptx)?;
    let (packed, partial) =
        (cached.with_extension("ptx.z"), cached.with_extension(std::process::id().to_string()));
    if !packed.exists() {
        let (header, body) = take_header(&ptx);
        let bytes = [header.into_bytes(), compress_to_vec_zlib(body.as_bytes(), 9)].concat();
        fs::write(&partial, bytes).map_err(|e| format!("{}: {e}", partial.display()))?;
        fs::rename(&partial, &packed).map_err(|e| format!("{}: {e}", packed.display()))?;
    }
    let output = folder.join(compressed_name(module, target));
    fs::copy(&packed, &output).map(drop).map_err(|e| format!("{}: {e}", output.display()))
}

/// A module that is the same for all targets: what was compiled for the first one, with a header of its own. There is no compressed
/// text of it.
fn write_twin(module: &str, target: &Target, folder: &Path) -> Result<()> {
    let (major, minor) = target.ptx_version;
    let header = format!(".version {major}.{minor}\n.target {}\n", target.name.replace("compute", "sm"));
    let (first, body) = take_header(&read(&folder.join(ptx_name(module, &TARGETS[0])))?);
    debug_assert_eq!(first.lines().count(), 2, "a version and a target");
    write(&folder.join(ptx_name(module, target)), &format!("{header}{body}"))?;
    write(&folder.join(compressed_name(module, target)), &header)
}

/// Stamps the PTX version down, drops the one hint that needs a newer version, and cuts the folders off the file names of
/// the line table.
fn finish(ptx: &str, target: &Target) -> String {
    let mut text = String::with_capacity(ptx.len());
    for line in ptx.lines() {
        let line = line.trim_end();
        if line.trim_start().starts_with(".pragma \"used_bytes_mask") {
            continue;
        }
        if let Some(version) = line.strip_prefix(".version ") {
            let _ = writeln!(text, ".version {}", lower(version, target.ptx_version));
        } else if let Some((head, path)) = line.strip_suffix('"').and_then(|l| l.split_once(" \"")) {
            let is_file = head.trim_start().starts_with(".file");
            let name = if is_file { path.rsplit('/').next().unwrap_or(path) } else { path };
            let _ = writeln!(text, "{head} \"{name}\"");
        } else {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

/// `13.0.88` out of `Cuda compilation tools, release 13.0, V13.0.88`.
fn release(version: &str) -> &str {
    let after = version.split_once(", V").map_or("of unknown version", |(_, after)| after);
    after.split_whitespace().next().unwrap_or(after)
}

fn lower(version: &str, stamp: (u32, u32)) -> String {
    let parsed = version.split_once('.').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    let (major, minor) = parsed.unwrap_or(stamp).min(stamp);
    format!("{major}.{minor}")
}

fn find_nvcc(target: &Path) -> Result<PathBuf> {
    let exe = format!("nvcc{}", env::consts::EXE_SUFFIX);
    if let Some(nvcc) = env::var_os("NVCC") {
        let nvcc = PathBuf::from(nvcc);
        return if nvcc.is_file() { Ok(nvcc) } else { Err(format!("NVCC={} is not a file", nvcc.display())) };
    }
    let installed = target.join("cuda-toolchain");
    let homes = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(env::var_os)
        .map(|home| Path::new(&home).join("bin"));
    let paths = env::var_os("PATH").unwrap_or_default();
    let last = [PathBuf::from("/usr/local/cuda/bin"), installed.join("bin")];
    let found = homes
        .chain(env::split_paths(&paths))
        .chain(last)
        .map(|bin| bin.join(&exe))
        .find(|nvcc| nvcc.is_file());
    match found {
        Some(nvcc) => Ok(nvcc),
        None if env::var_os("LORA_KERNELS_INSTALL_NVCC").is_some() => {
            install_nvcc(&installed).map_err(|e| format!("no nvcc found, and it could not be installed: {e}"))?;
            Ok(installed.join("bin").join(exe))
        }
        None => Err("the prebuilt PTX does not belong to these sources, and no nvcc was found (set NVCC or CUDA_HOME)".into()),
    }
}

/// Unpacks NVIDIA's wheels beside the final folder and renames that into place, so that it is whole or not there. Two
/// builds at once do the work twice; the later rename loses.
fn install_nvcc(folder: &Path) -> Result<()> {
    let partial = folder.with_extension(std::process::id().to_string());
    create_dir(&partial)?;
    let pip = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"];
    run(Command::new("python3").args(pip).arg(&partial).args(TOOLCHAIN))?;
    for wheel in list(&partial)? {
        run(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&partial))?;
    }
    let unpacked = partial.join("nvidia/cu13");
    for tool in list(&unpacked.join("bin"))?.into_iter().chain(list(&unpacked.join("nvvm/bin"))?) {
        run(Command::new("chmod").arg("+x").arg(tool))?;
    }
    let renamed = fs::rename(&unpacked, folder);
    let _ = fs::remove_dir_all(&partial);
    if folder.is_dir() { Ok(()) } else { renamed.map_err(|e| format!("{}: {e}", folder.display())) }
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().map_err(|e| format!("{}: {e}", command.get_program().display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    Err(format!("{command:?} failed:\n{text}{}", String::from_utf8_lossy(&output.stderr)))
}

/// Files and folders in `folder`, sorted; none where it does not exist.
fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(folder).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    let mut paths: Vec<PathBuf> = entries.map_err(|e| format!("{}: {e}", folder.display()))?;
    paths.sort();
    Ok(paths)
}

/// Mixes in a source's name and text; line ends do not count, as git may change them.
fn hash_file(hash: &mut Sha256, path: &Path) -> Result<()> {
    let text = read(path)?.replace('\r', "");
    hash.update(format!("{} {}\n{text}", path.file_name().expect("a file").display(), text.len()));
    Ok(())
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

fn create_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| format!("{}: {e}", path.display()))
}
