//! Inputs as text that a mutation keeps readable.

use std::borrow::Cow;

/// A `.safetensors` file. One that begins with `{` is the header, a zero byte, and the data; the header's length is put before
/// it here, so that a mutation may change it. Any other input is the file as it is.
pub fn file(input: &[u8]) -> Cow<'_, [u8]> {
    if input.first() != Some(&b'{') {
        return input.into();
    }
    let (header, data) = split(input);
    [&(header.len() as u64).to_le_bytes(), header, data].concat().into()
}

/// What comes before the first zero byte, and what comes after it.
pub fn split(input: &[u8]) -> (&[u8], &[u8]) {
    match input.iter().position(|byte| *byte == 0) {
        Some(zero) => (&input[..zero], &input[zero + 1..]),
        None => (input, &[]),
    }
}
