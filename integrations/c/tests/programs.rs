//! Programs in C, C++ and Python that use the library, built and run as a user would.

use std::path::{Path, PathBuf};
use std::process::Command;

fn here(inside: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(inside)
}

/// The folder where cargo has put the libraries: that of this test.
fn libraries() -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().to_owned()
}

/// Runs a command and gives what it printed.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}{err}", output.status);
    out.into_owned()
}

/// The C program, with every warning an error, by the compiler `cc` (`CC`) or `c++` (`CXX`).
fn compile_and_run(variable: &str, compiler: &str, standard: &[&str], link: &[&str]) {
    let compiler = std::env::var(variable).unwrap_or_else(|_| compiler.to_owned());
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("smoke-{variable}-{}", link.len()));
    let mut command = Command::new(compiler);
    command.args(standard).args(["-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]);
    command.arg("-I").arg(here("include")).arg(here("tests/smoke.c")).arg("-o").arg(&program);
    command.args(link).args(["-lpthread", "-ldl", "-lm"]);
    run(&mut command);
    let printed = run(Command::new(program).env("LD_LIBRARY_PATH", libraries()));
    assert!(printed.ends_with("all checks passed\n"), "{printed}");
}

#[test]
fn a_c_program_with_the_static_library() {
    let library = libraries().join("liblora_kernels_c.a");
    compile_and_run("CC", "cc", &["-std=c11"], &[library.to_str().unwrap()]);
}

#[test]
fn a_c_program_with_the_shared_library() {
    let folder = format!("-L{}", libraries().display());
    compile_and_run("CC", "cc", &["-std=c11"], &[&folder, "-llora_kernels_c"]);
}

#[test]
fn the_same_as_cpp() {
    let library = libraries().join("liblora_kernels_c.a");
    compile_and_run("CXX", "c++", &["-x", "c++", "-std=c++17"], &["-x", "none", library.to_str().unwrap()]);
}

#[test]
fn the_python_example() {
    let mut command = Command::new("python3");
    command.arg(here("examples/linear.py")).arg("--library").arg(libraries().join("liblora_kernels_c.so"));
    let printed = run(&mut command);
    assert!(printed.contains("the two agree"), "{printed}");
}
