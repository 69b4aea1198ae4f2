//! What the documentation says about speed is what was measured.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;

fn text(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path))
        .unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The words of a file, without the marks of comments and line ends between them.
fn prose(path: &str) -> String {
    let lines = text(path);
    let words =
        lines.lines().map(|line| line.trim_start().trim_start_matches("//!").trim_start_matches("//"));
    words.flat_map(str::split_whitespace).collect::<Vec<_>>().join(" ")
}

/// The least and the largest speed of the fastest kernel of a kind, over shapes of `least` tokens and more; that of `other` is 1.
fn beside(other: &str, kind: &str, least: u64) -> (f64, f64) {
    let results: Value =
        serde_json::from_str(&text("benches/results/2026-11-27-nvidia-h200-prefill.json")).unwrap();
    let mut times = BTreeMap::<_, [f64; 2]>::new();
    for row in results["rows"].as_array().unwrap() {
        let [m, n, k] = ["m", "n", "k"].map(|key| row[key].as_u64().unwrap());
        let kernel = row["kernel"].as_str().unwrap();
        if row["run"] != "prototypes" || m < least {
            continue;
        }
        let of_shape = times.entry((m, n, k)).or_insert([f64::INFINITY; 2]);
        for (time, name) in of_shape.iter_mut().zip([kind, other]) {
            if kernel.starts_with(name) {
                *time = time.min(row["us"].as_f64().unwrap());
            }
        }
    }
    let speeds = times.values().map(|[ours, other]| other / ours);
    speeds.fold((f64::INFINITY, 0.0), |(least, most), speed| (speed.min(least), speed.max(most)))
}

#[test]
fn prefill_beside_cublas() {
    let (nf4, dense) = (beside("cublas", "hmul", 256), beside("cublas", "dense", 256));
    let claim = format!(
        "from 256 tokens on {:.2} to {:.2} times the speed of cuBLAS with a 16-bit weight (a dense W {:.2} to {:.2})",
        nf4.0, nf4.1, dense.0, dense.1
    );
    assert!(prose("src/cuda/matmul.rs").contains(&claim), "{claim}");
    // "and faster than dequantising and cuBLAS at every shape"
    assert!(beside("dequant_cublas", "hmul", 0).0 > 1.0);
}

/// The rows of a file of results.
fn rows(path: &str) -> Vec<Value> {
    let results: Value = serde_json::from_str(&text(path)).unwrap();
    results["rows"].as_array().unwrap().clone()
}

#[test]
fn models_on_a_cpu() {
    let rows = rows("benches/results/2026-11-27-cpu-models.json");
    let seconds = |program: &str| {
        let row = rows.iter().find(|row| row["place"] == "memory" && row["program"] == program).unwrap();
        row["seconds"].as_f64().unwrap()
    };
    let faster = |what: &str, peer: &str| {
        seconds(&format!("{what}: {peer}")) / seconds(&format!("{what}: lora-kernels"))
    };
    let claim = format!(
        "merged {:.1} times as fast as PEFT merges it, and quantised {:.1} times as fast as bitsandbytes quantises it",
        faster("merge", "PEFT"),
        faster("quantise", "bitsandbytes")
    );
    assert!(prose("README.md").contains(&claim), "{claim}");
}

#[test]
fn products_and_steps_on_a_cpu() {
    let range = |ratios: Vec<f64>| {
        (ratios.iter().copied().fold(f64::INFINITY, f64::min), ratios.iter().copied().fold(0.0, f64::max))
    };
    let rows = rows("benches/results/2026-11-27-cpu-products.json");
    let few = rows.iter().filter(|row| row["m"].as_u64().is_some_and(|m| m <= 32));
    let (least, most) = range(
        few.map(|row| row["peers_ms"]["bitsandbytes"].as_f64().unwrap() / row["ours_ms"].as_f64().unwrap())
            .collect(),
    );
    let claim = format!("{least:.1} to {most:.1} times as fast as those of bitsandbytes");
    assert!(prose("README.md").contains(&claim), "{claim}");

    let table = text("benches/results/2026-11-27-cpu-training.md");
    let steps = table.lines().filter_map(|line| line.strip_suffix(" |")?.rsplit_once("| ")?.1.parse().ok());
    let (least, most) = range(steps.collect());
    let claim = format!("{least:.2} to {most:.2} times as fast as with PEFT");
    assert!(prose("README.md").contains(&claim), "{claim}");
}

/// Every file of results is in the table of their README, and every file that it names is there.
#[test]
fn results_are_listed() {
    let readme = text("benches/results/README.md");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results");
    for file in fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap();
        assert!(stem == "README" || readme.contains(&format!("`{stem}")), "{stem} is not in the table");
    }
}
