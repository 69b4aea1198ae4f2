//! Every check has a kernel that provokes it, and does not fire when the same kernel is right.

use ptx_emulator::{Counters, Fault, FaultKind, Gpu, Launch, Module, Spec};

struct Case {
    kernel: &'static str,
    kind: FaultKind,
    blocks: u32,
    threads: u32,
    /// Part of the message.
    says: &'static str,
}

const fn case(kernel: &'static str, kind: FaultKind, blocks: u32, threads: u32, says: &'static str) -> Case {
    Case { kernel, kind, blocks, threads, says }
}

const CASES: &[Case] = &[
    case("read_behind_the_end", FaultKind::OutOfBounds, 1, 32, "behind the end of `x`"),
    case("write_before_the_start", FaultKind::OutOfBounds, 1, 32, "4 bytes before `y`"),
    case("misaligned", FaultKind::Misaligned, 1, 32, "multiple of the 4 bytes"),
    case("uninitialised_global", FaultKind::UninitializedMemory, 1, 32, "`y`, which nobody wrote"),
    case("write_constant_data", FaultKind::ReadOnly, 1, 1, "constant `table`"),
    case("uninitialised_shared", FaultKind::UninitializedMemory, 1, 32, "that nobody wrote"),
    case("shared_outside", FaultKind::OutOfBounds, 1, 32, "outside of every shared array"),
    case("dynamic_shared_outside", FaultKind::OutOfBounds, 1, 32, "outside of every shared array"),
    case("uninitialised_register_stored", FaultKind::UninitializedRegister, 1, 32, "never written"),
    case("branch_on_uninitialised", FaultKind::UninitializedRegister, 1, 32, "guard predicate"),
    case("race_read_after_write", FaultKind::SharedRace, 1, 64, "races with a"),
    case("race_write_after_read", FaultKind::SharedRace, 1, 64, "races with a"),
    case("race_write_write", FaultKind::SharedRace, 1, 64, "races with a"),
    case("race_inside_a_warp", FaultKind::SharedRace, 1, 32, "races with a"),
    case("race_inside_a_warp_over_data_in_use", FaultKind::SharedRace, 1, 32, "races with a read"),
    case("race_named_barriers", FaultKind::SharedRace, 1, 128, "races with a"),
    case("race_of_blocks", FaultKind::GlobalRace, 3, 32, "blocks [0, 0, 0] and [1, 0, 0] both write"),
    case("divergent_barrier", FaultKind::Divergence, 1, 64, "do not reach with them"),
    case(
        "deadlock_between_barriers",
        FaultKind::Deadlock,
        1,
        64,
        "waits at barrier 1, where 32 of 64 threads arrived",
    ),
    case("deadlock_of_lanes", FaultKind::Deadlock, 1, 32, "waits for other lanes"),
    case("named_barrier_counts", FaultKind::Operand, 1, 64, "while another warp waits"),
    case("copy_read_before_wait", FaultKind::InFlight, 1, 32, "not waited for"),
    case("copy_without_commit", FaultKind::InFlight, 1, 32, "not waited for"),
    case("copy_read_by_another_thread", FaultKind::SharedRace, 1, 64, "races with a"),
    case("copy_source_changes", FaultKind::InFlight, 1, 32, "source of an asynchronous copy"),
    case("copy_over_data_in_use", FaultKind::SharedRace, 1, 64, "races with a"),
    case("shuffle_from_a_missing_lane", FaultKind::Operand, 1, 32, "does not take part"),
    case("shuffle_outside_of_its_mask", FaultKind::Operand, 1, 32, "not in its own member mask"),
    case("half_a_warp_multiplies", FaultKind::Divergence, 1, 32, "without the others"),
    case("trap_instruction", FaultKind::Trap, 1, 32, "trap"),
    case("endless_loop", FaultKind::Timeout, 1, 32, "instructions"),
    case("local_outside", FaultKind::OutOfBounds, 1, 32, "local memory"),
];

/// What is special to sm_90a.
const HOPPER: &[Case] = &[
    case("neighbour_before_its_start", FaultKind::SharedRace, 2, 32, "known to have started"),
    case("neighbour_after_its_end", FaultKind::UseAfterFree, 2, 32, "that block has ended"),
    case("neighbour_may_have_ended", FaultKind::UseAfterFree, 2, 32, "may still use its shared memory"),
    case("neighbour_may_still_arrive", FaultKind::UseAfterFree, 2, 32, "may still use its shared memory"),
    case("neighbour_may_still_store", FaultKind::UseAfterFree, 2, 32, "may still use its shared memory"),
    case("neighbour_not_published", FaultKind::SharedRace, 2, 32, "no barrier orders"),
    case("neighbour_overwritten", FaultKind::SharedRace, 2, 32, "races with a"),
    case("neighbour_in_the_own_window", FaultKind::OutOfBounds, 2, 32, "shared"),
    case("rank_outside", FaultKind::Operand, 2, 32, "rank 2"),
    case("wait_without_arrival", FaultKind::Operand, 2, 32, "without an arrival"),
    case("two_arrivals", FaultKind::Operand, 2, 32, "second arrival"),
    case("cluster_deadlock", FaultKind::Deadlock, 2, 32, "1 arrivals and 0 bytes"),
    case("initialised_for_the_neighbour", FaultKind::SharedRace, 2, 32, "initialisation"),
    case("remote_store_not_waited", FaultKind::InFlight, 2, 32, "will arrive"),
    case("no_barrier_there", FaultKind::Operand, 1, 64, "no mbarrier"),
    case("initialised_without_a_barrier", FaultKind::SharedRace, 1, 64, "initialisation"),
    case("initialised_twice", FaultKind::Operand, 1, 64, "there is one already"),
    case("barrier_read_as_data", FaultKind::Operand, 1, 64, "that is an mbarrier"),
    case("too_many_arrivals", FaultKind::Deadlock, 1, 64, "arrivals"),
    case("too_few_arrivals", FaultKind::Deadlock, 1, 64, "1 arrivals and 0 bytes"),
    case("data_behind_an_mbarrier", FaultKind::SharedRace, 1, 64, "no barrier orders"),
    case("one_lane_tells_for_its_warp", FaultKind::SharedRace, 1, 64, "races with a write"),
    case("one_lane_gives_back_for_its_warp", FaultKind::SharedRace, 1, 64, "races with a read"),
    case("state_of_long_ago", FaultKind::Operand, 1, 64, "state of phase 0"),
    case("loaded_without_handing_over", FaultKind::MissingFence, 1, 64, "fence.mbarrier_init"),
    case("load_not_waited", FaultKind::InFlight, 1, 64, "will arrive"),
    case("load_waited_by_another_warp", FaultKind::SharedRace, 1, 64, "asynchronous copy"),
    case("load_tried_once", FaultKind::InFlight, 1, 64, "will arrive"),
    case("fewer_bytes_expected", FaultKind::InFlight, 1, 64, "will arrive"),
    case("more_bytes_expected", FaultKind::Deadlock, 1, 64, "16 bytes"),
    case("load_never_waited", FaultKind::InFlight, 1, 64, "the block ends"),
    case("load_misaligned", FaultKind::Misaligned, 1, 64, "the source"),
    case("load_outside", FaultKind::OutOfBounds, 1, 64, "outside of every shared array"),
    case("load_source_changes", FaultKind::InFlight, 1, 64, "was changed"),
    case("load_over_data_in_use", FaultKind::SharedRace, 1, 64, "races with a read"),
    case("load_over_ordinary_writes", FaultKind::MissingFence, 1, 64, "fence.proxy.async"),
    case("stored_without_handing_over", FaultKind::MissingFence, 1, 64, "fence.proxy.async"),
    case("stored_without_a_barrier", FaultKind::SharedRace, 1, 64, "races with a write"),
    case("store_source_overwritten", FaultKind::InFlight, 1, 64, "still reads"),
    case("store_not_waited", FaultKind::InFlight, 1, 64, "the block ends"),
    case("store_not_committed", FaultKind::InFlight, 1, 64, "the block ends"),
    case("stored_data_read_back_early", FaultKind::InFlight, 1, 64, "bulk store"),
    case("no_tensor_map", FaultKind::Operand, 1, 64, "no tensor map"),
    case("counted_copies_not_waited", FaultKind::InFlight, 1, 64, "will arrive"),
    case("registers_that_nobody_gives", FaultKind::Deadlock, 1, 384, "240 registers"),
    case("product_of_what_was_not_handed_over", FaultKind::MissingFence, 1, 128, "fence.proxy.async"),
    case("product_without_a_barrier", FaultKind::SharedRace, 1, 128, "races with a write"),
    case("product_without_a_fence", FaultKind::MissingFence, 1, 128, "wgmma.fence"),
    case("sums_read_early", FaultKind::InFlight, 1, 128, "wgmma"),
    case("product_not_committed", FaultKind::InFlight, 1, 128, "wgmma"),
    case("operand_overwritten", FaultKind::InFlight, 1, 128, "still reads"),
    case("operand_released_early", FaultKind::SharedRace, 1, 256, "asynchronous work of warp"),
    case("fragment_changed", FaultKind::InFlight, 1, 128, "wgmma"),
    case("product_never_waited", FaultKind::InFlight, 1, 128, "waited for its wgmma"),
    case("three_warps_multiply", FaultKind::Divergence, 1, 128, "products of wgmma"),
    case(
        "warps_multiply_different_things",
        FaultKind::Divergence,
        1,
        128,
        "the warps of the warpgroup differ",
    ),
    case("pattern_not_aligned", FaultKind::Operand, 1, 128, "pattern"),
    case("operand_outside", FaultKind::OutOfBounds, 1, 128, "outside of every shared array"),
];

/// Kernels whose `broken` form is as right as the other.
const FINE: &[(&str, u32, u32)] = &[
    ("read_constant_data", 1, 32),
    ("uninitialised_register_unused", 1, 32),
    ("race_of_bytes_is_none", 1, 64),
    ("race_of_blocks_bytes_is_none", 3, 32),
    ("exited_threads_do_not_count", 1, 64),
];

fn spec() -> Spec {
    Spec { max_warp_instructions: 100_000, ..Spec::a100() }
}

fn run(kernel: &str, blocks: u32, threads: u32, broken: u32) -> Result<Counters, Box<Fault>> {
    let mut module = Module::parse("faults", include_str!("kernels/faults.ptx")).unwrap();
    let mut spec = spec();
    if module.entry(kernel).is_none() {
        module = Module::parse("hopper", include_str!("kernels/hopper_faults.ptx")).unwrap();
        spec = Spec { max_warp_instructions: 100_000, ..Spec::h200() };
    }
    let gpu = Gpu::new(spec);
    let n = blocks * threads;
    let (x, y) = (gpu.alloc(4 * n as usize, "x").unwrap(), gpu.alloc(4 * n as usize, "y").unwrap());
    let data: Vec<u8> = (0..n).flat_map(|i| (i as f32).to_le_bytes()).collect();
    gpu.write(x, &data).unwrap();
    let launch = Launch { dynamic_shared: 128, ..Launch::linear(blocks, threads) };
    gpu.launch(
        &module,
        kernel,
        &launch,
        &[&x.to_le_bytes(), &y.to_le_bytes(), &n.to_le_bytes(), &broken.to_le_bytes()],
    )
}

#[test]
fn every_check_finds_its_mistake_and_nothing_else() {
    for case in CASES.iter().chain(HOPPER) {
        if let Err(fault) = run(case.kernel, case.blocks, case.threads, 0) {
            panic!("{} is right and was refused: {fault}", case.kernel);
        }
        let Err(fault) = run(case.kernel, case.blocks, case.threads, 1) else {
            panic!("{} is wrong and was not found", case.kernel);
        };
        assert_eq!(fault.kind, case.kind, "{}: {fault}", case.kernel);
        assert!(fault.to_string().contains(case.says), "{}: {fault}", case.kernel);
        assert_eq!(fault.kernel, case.kernel);
        assert!(fault.ptx_line > 0, "{fault}");
        assert!(fault.block.is_some() && fault.source_line.is_some(), "{fault}");
    }
}

#[test]
fn right_kernels_pass() {
    for (kernel, blocks, threads) in FINE {
        for broken in [0, 1] {
            run(kernel, *blocks, *threads, broken).unwrap_or_else(|fault| panic!("{kernel}: {fault}"));
        }
    }
}

/// `exited_threads_do_not_count` with threads that leave before the barrier.
#[test]
fn threads_that_left_are_not_waited_for() {
    let module = Module::parse("faults", include_str!("kernels/faults.ptx")).unwrap();
    let gpu = Gpu::new(spec());
    let y = gpu.alloc(4 * 64, "y").unwrap();
    for n in [1u32, 20, 33, 64] {
        let args: [&[u8]; 4] = [&0u64.to_le_bytes(), &y.to_le_bytes(), &n.to_le_bytes(), &[0; 4]];
        gpu.launch(&module, "exited_threads_do_not_count", &Launch::linear(1, 64), &args).unwrap();
    }
}

#[test]
fn use_after_free_is_named() {
    let module = Module::parse("faults", include_str!("kernels/faults.ptx")).unwrap();
    let gpu = Gpu::new(spec());
    let (x, y) = (gpu.alloc(128, "weights").unwrap(), gpu.alloc(128, "y").unwrap());
    gpu.write(x, &[0; 128]).unwrap();
    let launch = |broken: u32| {
        let args: [&[u8]; 4] = [&x.to_le_bytes(), &y.to_le_bytes(), &[0; 4], &broken.to_le_bytes()];
        gpu.launch(&module, "read_freed", &Launch::linear(1, 32), &args)
    };
    launch(1).unwrap();
    gpu.free(x).unwrap();
    launch(0).unwrap();
    let fault = launch(1).unwrap_err();
    assert_eq!(fault.kind, FaultKind::UseAfterFree);
    assert!(fault.message.contains("`weights`, which was freed"), "{fault}");
    assert!(gpu.free(x).is_err() && gpu.read(x, &mut [0; 4]).is_err());
}

#[test]
fn a_fault_says_where_it_is() {
    let fault = run("read_behind_the_end", 1, 32, 1).unwrap_err();
    assert_eq!(fault.thread, Some([31, 0, 0]));
    assert_eq!(fault.block, Some([0, 0, 0]));
    assert!(fault.instruction.starts_with("ld.global"), "{fault}");
    let source = fault.source_line.clone().unwrap();
    let line = include_str!("kernels/faults.cu").lines().nth(source.line as usize - 1).unwrap();
    assert!(source.file == "faults.cu" && line.contains("KERNEL(read_behind_the_end)"), "{fault}");
}

#[test]
fn the_first_fault_by_block_is_reported_whatever_the_threads() {
    let module = Module::parse("faults", include_str!("kernels/faults.ptx")).unwrap();
    for host_threads in [1, 2, 3, 8] {
        let gpu = Gpu::new(Spec { host_threads, ..spec() });
        // Space for three of the blocks: all later ones fault.
        let (x, y) = (gpu.alloc(4 * 32 * 40, "x").unwrap(), gpu.alloc(4 * 32 * 3, "y").unwrap());
        gpu.write(x, &[0; 4 * 32 * 40]).unwrap();
        let args: [&[u8]; 4] = [&x.to_le_bytes(), &y.to_le_bytes(), &1280u32.to_le_bytes(), &[0; 4]];
        let fault = gpu.launch(&module, "read_behind_the_end", &Launch::linear(40, 32), &args).unwrap_err();
        assert_eq!((fault.block, fault.thread), (Some([3, 0, 0]), Some([0, 0, 0])), "{fault}");
    }
}

#[test]
fn impossible_launches_are_refused() {
    let module = Module::parse("faults", include_str!("kernels/faults.ptx")).unwrap();
    let gpu = Gpu::new(spec());
    let pointer = [0u8; 8];
    let int = [0u8; 4];
    let args: [&[u8]; 4] = [&pointer, &pointer, &int, &int];
    let good = Launch::linear(1, 32);
    let refused = |launch: Launch, args: &[&[u8]], says: &str| {
        let fault = gpu.launch(&module, "trap_instruction", &launch, args).unwrap_err();
        assert!(fault.kind == FaultKind::Launch && fault.message.contains(says), "{fault}");
    };
    gpu.launch(&module, "trap_instruction", &good, &args).unwrap();
    refused(Launch { dynamic_shared: 164 << 10, ..good }, &args, "shared memory");
    refused(Launch::linear(1, 1025), &args, "1024 threads");
    refused(Launch::linear(0, 32), &args, "dimension is zero");
    refused(Launch { cluster: [2, 1, 1], ..Launch::linear(4, 32) }, &args, "capability 9.0");
    refused(Launch { grid: [1, 70000, 1], ..good }, &args, "above");
    refused(good, &args[..3], "4 parameters are wanted");
    refused(good, &[&pointer, &pointer, &int, &pointer], "has 4 bytes, 8 given");
    assert!(gpu.launch(&module, "nothing", &good, &[]).unwrap_err().message.contains("no entry"));
    let hopper =
        Module::parse("h", ".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry k() { ret; }")
            .unwrap();
    assert!(gpu.launch(&hopper, "k", &good, &[]).unwrap_err().message.contains("sm_90a"));
    let bound =
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k() .maxntid 64, 1, 1 { ret; }";
    let bound = Module::parse("b", bound).unwrap();
    assert!(gpu.launch(&bound, "k", &Launch::linear(1, 65), &[]).unwrap_err().message.contains(".maxntid"));
    let greedy = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k() .maxnreg 128 { ret; }";
    let greedy = Module::parse("g", greedy).unwrap();
    gpu.launch(&greedy, "k", &Launch::linear(1, 512), &[]).unwrap();
    assert!(
        gpu.launch(&greedy, "k", &Launch::linear(1, 544), &[]).unwrap_err().message.contains("registers")
    );
}

#[test]
fn unknown_instructions_are_refused_at_load() {
    let with = |line: &str| {
        let text = format!(
            ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k()\n{{\n.reg .b32 %r<3>;\n{line}\nret;\n}}"
        );
        Module::parse("m", &text).map(|_| ()).unwrap_err()
    };
    for (line, says) in [
        ("frobnicate.u32 %r1, %r2;", "frobnicate.u32"),
        ("add.u32.weird %r1, %r2, %r2;", "weird"),
        ("add.u32 %r1, %r2, %r9;", "%r9"),
        ("add.u32 %r1, %r2;", "3 operands"),
        ("ld.global.u32 %r1, %r2;", "address"),
        ("bra nowhere;", "nowhere"),
    ] {
        let error = with(line);
        assert!(error.line == 7 && error.message.contains(says), "{error}");
    }
}

#[test]
fn host_accesses_are_checked() {
    let gpu = Gpu::new(Spec { memory: 4096, ..Spec::a100() });
    let a = gpu.alloc(100, "a").unwrap();
    assert_eq!(a % 256, 0);
    assert!(gpu.read(a, &mut [0; 4]).unwrap_err().to_string().contains("byte 0 of `a`"));
    gpu.write(a + 8, &[1; 8]).unwrap();
    gpu.read(a + 8, &mut [0; 8]).unwrap();
    assert!(gpu.read(a + 9, &mut [0; 8]).unwrap_err().to_string().contains("byte 16"));
    assert!(gpu.write(a + 96, &[0; 5]).is_err());
    assert!(gpu.write(a - 1, &[0; 1]).is_err());
    assert!(gpu.alloc(4000, "b").unwrap_err().to_string().contains("`b`"));
    assert!(gpu.free(a + 4).is_err());
}
