//! The kernels in the library are those that the tables of `src/cuda` name, with the parameters that they name.

use std::collections::{BTreeMap, BTreeSet};

use lora_kernels::Error;
use lora_kernels::cuda::{Image, Target, kernels, modules, origin};

/// Entry names of a module with the sizes of their parameters.
fn entries(image: &Image) -> BTreeMap<String, usize> {
    let ptx = image.ptx();
    let after_entry = ptx.split(".entry ").skip(1);
    let parsed = after_entry.map(|text| {
        let (name, rest) = text.split_once('(').expect("parameters");
        let parameters = rest.split_once(')').expect("an end of the parameters").0;
        assert_eq!(parameters.matches(".param").count(), 1, "{name} takes one struct");
        let size = parameters.rsplit_once('[').expect("a struct").1.trim_end().trim_end_matches(']');
        (name.trim().to_owned(), size.parse().expect("a size"))
    });
    parsed.collect()
}

#[test]
fn the_build_has_kernels() {
    assert!(!modules().is_empty(), "no PTX in this build: {}", origin());
}

#[test]
fn every_entry_is_in_the_registry_with_the_size_of_its_parameters() {
    let mut registered = BTreeMap::<&str, BTreeMap<String, usize>>::new();
    for kernel in kernels() {
        let again =
            registered.entry(kernel.module).or_default().insert(kernel.entry.into(), kernel.param_bytes);
        assert_eq!(again, None, "{} is registered twice", kernel.entry);
    }
    for target in Target::ALL {
        let compiled: BTreeMap<_, _> = modules()
            .iter()
            .filter(|image| image.target == target)
            .map(|image| (image.module, entries(image)))
            .collect();
        assert_eq!(compiled, registered, "compiled for {target} (left) and registered (right)");
    }
}

#[test]
fn entry_names_are_unique_and_begin_with_their_module() {
    let mut seen = BTreeSet::new();
    for kernel in kernels() {
        assert!(seen.insert(kernel.entry), "{} is in two modules", kernel.entry);
        assert!(kernel.entry.starts_with(kernel.module), "{} of {}", kernel.entry, kernel.module);
    }
}

#[test]
fn ptx_is_stamped_for_drivers_from_r525_on() {
    for image in modules() {
        let (version, target) = match image.target {
            Target::Compute80 => (".version 7.4", ".target sm_80"),
            Target::Compute90a => (".version 8.0", ".target sm_90a"),
        };
        for line in [version, target] {
            assert!(
                image.ptx().lines().any(|l| l == line),
                "{} for {} has no `{line}`",
                image.module,
                image.target
            );
        }
    }
}

#[test]
fn ptx_does_not_depend_on_where_it_was_compiled() {
    for image in modules() {
        for line in image.ptx().lines() {
            let place = format!("{} for {}: {line}", image.module, image.target);
            assert!(!line.contains("_INTERNAL_"), "the name of a static symbol hashes the path; {place}");
            let file = line.trim_start().strip_prefix(".file");
            assert!(file.is_none_or(|file| !file.contains(['/', '\\'])), "a path; {place}");
        }
    }
}

#[test]
fn hopper_alone_gets_its_own_instructions() {
    use Target::{Compute80, Compute90a};
    for (capability, target) in [
        ((8, 0), Compute80),
        ((8, 6), Compute80),
        ((8, 9), Compute80),
        ((9, 0), Compute90a),
        ((9, 1), Compute80),
        ((10, 0), Compute80),
        ((10, 3), Compute80),
        ((12, 0), Compute80),
        ((12, 1), Compute80),
    ] {
        assert_eq!(Target::for_capability(capability).expect("supported"), target, "{capability:?}");
    }
    for capability in [(5, 0), (7, 0), (7, 5)] {
        let error = Target::for_capability(capability).expect_err("too old");
        assert!(matches!(error, Error::NoDevice { .. }), "{error}");
    }
}

#[test]
#[ignore = "needs all other tests to have run: .ci/run does it"]
fn every_kernel_was_launched_by_a_test() {
    let never: Vec<_> = kernels().filter(|&kernel| !lora_kernels_devices::was_launched(kernel)).collect();
    assert!(never.is_empty(), "no test has launched {never:#?}");
}
