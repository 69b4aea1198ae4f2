//! What a table of adapters accepts.

mod products;

use lora_kernels::cuda::{AdapterTable, AdapterView, MAX_RANK, check_adapter_index};
use lora_kernels::{Error, Result};
use lora_kernels_devices::Device;

#[test]
fn a_table_knows_its_adapters() {
    let device = Device::best();
    let factors = device.upload(&vec![1.0f32; 256 * 12]);
    let ranks = [8, 0, 256, 3];
    let adapters = ranks.map(|rank| AdapterView {
        lora_a: factors.slice(..rank * 12),
        lora_b: factors.slice(..5 * rank),
        rank,
        scaling: 1.0,
    });
    let mut buffer = device.alloc(AdapterTable::<f32>::bytes(4) + 100);
    let table = AdapterTable::upload(device.queue(), &adapters, 12, 5, buffer.view_mut()).unwrap();
    assert_eq!((table.len(), table.k(), table.n()), (4, 12, 5));
    assert_eq!((table.ranks(), table.max_rank(), table.v_columns()), (&ranks[..], 256, 256));
    let mut nothing = device.alloc(0);
    let table = AdapterTable::<f32>::upload(device.queue(), &[], 12, 5, nothing.view_mut()).unwrap();
    assert!(table.is_empty() && table.max_rank() == 0 && table.v_columns() == 0);
}

#[test]
fn what_is_wrong_is_named() {
    let device = Device::best();
    let elsewhere = Device::emulator();
    let (factors, foreign) = (device.upload(&[1.0f32; 64]), elsewhere.upload(&[1.0f32; 64]));
    let mut buffer = device.alloc(AdapterTable::<f32>::bytes(2));
    let right =
        AdapterView { lora_a: factors.slice(..12), lora_b: factors.slice(..15), rank: 3, scaling: 0.5 };
    let mut refused = |adapter: AdapterView<'_, f32>, bytes: usize, argument: &str, got: &str| {
        let result: Result<_> =
            AdapterTable::upload(device.queue(), &[right, adapter], 4, 5, buffer.slice_mut(..bytes))
                .map(drop);
        match result {
            Err(Error::Argument { argument: named, got: came, .. }) => {
                assert_eq!((named.as_str(), came.as_str()), (argument, got));
            }
            other => panic!("{argument}: {other:?}"),
        }
    };
    refused(AdapterView { rank: MAX_RANK + 1, ..right }, 64, "adapters[1].rank", "257");
    refused(AdapterView { rank: usize::MAX, ..right }, 64, "adapters[1].rank", &usize::MAX.to_string());
    refused(AdapterView { rank: 2, ..right }, 64, "adapters[1].lora_a", "12");
    refused(AdapterView { lora_b: factors.slice(..16), ..right }, 64, "adapters[1].lora_b", "16");
    refused(
        AdapterView { lora_a: foreign.slice(..12), ..right },
        64,
        "adapters[1].lora_a",
        "another device's",
    );
    refused(AdapterView { scaling: f32::NAN, ..right }, 64, "adapters[1].scaling", "NaN");
    refused(right, 63, "buffer", "63");
    let unaligned = factors.slice(1..13);
    let address = format!("address {:#x}", unaligned.address());
    refused(AdapterView { lora_a: unaligned, ..right }, 64, "adapters[1].lora_a", &address);
}

#[test]
fn an_index_is_checked_on_the_host() {
    check_adapter_index(&[], 0).unwrap();
    check_adapter_index(&[-1, 0, 2, 1], 3).unwrap();
    for (index, at) in [(vec![0, 3], 1), (vec![-2], 0), (vec![1, 1, i32::MIN, 9], 2)] {
        let Err(Error::Argument { argument, got, .. }) = check_adapter_index(&index, 3) else { panic!() };
        assert_eq!((argument, got), (format!("adapter_index[{at}]"), index[at].to_string()));
    }
    assert!(check_adapter_index(&[0], 0).is_err());
}
