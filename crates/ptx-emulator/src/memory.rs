//! Global memory: allocations far apart, with what was initialised, who wrote, and what was touched.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::MemoryError;

/// Every allocation starts in a 4 GiB slot of the address space of its own, in the middle of unmapped addresses.
const SLOT_SHIFT: u32 = 32;
const FIRST_SLOT: u64 = 0x7000;
const LEAD: u64 = 0x4000_0000;

/// Generic windows of the other spaces.
pub(crate) const SHARED_WINDOW: u64 = 1 << SLOT_SHIFT;
pub(crate) const LOCAL_WINDOW: u64 = 2 << SLOT_SHIFT;
pub(crate) const PARAM_WINDOW: u64 = 3 << SLOT_SHIFT;
pub(crate) const WINDOW_MASK: u64 = !0 << SLOT_SHIFT;

fn zeroed(count: usize) -> Box<[AtomicU64]> {
    let plain = vec![0u64; count].into_boxed_slice();
    // SAFETY: AtomicU64 has the size and bit validity of u64, and on every 64-bit target its alignment.
    unsafe { Box::from_raw(Box::into_raw(plain) as *mut [AtomicU64]) }
}

/// Bytes that several threads may read and write at once; untouched pages cost nothing.
pub(crate) struct Bytes {
    words: Box<[AtomicU64]>,
}

impl Bytes {
    fn new(len: usize) -> Bytes {
        Bytes { words: zeroed(len.div_ceil(8) + 1) }
    }

    /// `S` bytes at an offset that is a multiple of `S`.
    #[inline(always)]
    pub(crate) fn load<const S: usize>(&self, offset: usize) -> [u8; S] {
        let mut out = [0; S];
        let first = self.words[offset >> 3].load(Relaxed);
        match S {
            16 => {
                out[..8].copy_from_slice(&first.to_le_bytes());
                out[8..].copy_from_slice(&self.words[(offset >> 3) + 1].load(Relaxed).to_le_bytes());
            }
            _ => out.copy_from_slice(&(first >> ((offset & 7) * 8)).to_le_bytes()[..S]),
        }
        out
    }

    /// `S` bytes at an offset that is a multiple of `S`.
    #[inline(always)]
    pub(crate) fn store<const S: usize>(&self, offset: usize, value: [u8; S]) {
        let word = |at: usize| u64::from_le_bytes(value[at..at + 8].try_into().unwrap_or_default());
        match S {
            16 => {
                self.words[offset >> 3].store(word(0), Relaxed);
                self.words[(offset >> 3) + 1].store(word(8), Relaxed);
            }
            8 => self.words[offset >> 3].store(word(0), Relaxed),
            _ => {
                let at = &self.words[offset >> 3];
                // SAFETY: `at` is a live word; offset & 7 is a multiple of S, so the narrower atomic lies in it, aligned.
                unsafe {
                    let at = (at.as_ptr() as *mut u8).add(offset & 7);
                    match S {
                        4 => AtomicU32::from_ptr(at as *mut u32)
                            .store(u32::from_le_bytes([value[0], value[1], value[2], value[3]]), Relaxed),
                        2 => AtomicU16::from_ptr(at as *mut u16)
                            .store(u16::from_le_bytes([value[0], value[1]]), Relaxed),
                        _ => AtomicU8::from_ptr(at).store(value[0], Relaxed),
                    }
                }
            }
        }
    }

    /// Replaces the word at an offset (multiple of 8) as one atomic step; returns the old one.
    pub(crate) fn update(&self, offset: usize, mut f: impl FnMut(u64) -> u64) -> u64 {
        let cell = &self.words[offset >> 3];
        let mut old = cell.load(Relaxed);
        loop {
            match cell.compare_exchange_weak(old, f(old), Relaxed, Relaxed) {
                Ok(_) => return old,
                Err(now) => old = now,
            }
        }
    }

    pub(crate) fn copy_out(&self, offset: usize, out: &mut [u8]) {
        let mut at = 0;
        while at < out.len() {
            let (word, skip) = ((offset + at) >> 3, (offset + at) & 7);
            let n = (8 - skip).min(out.len() - at);
            out[at..at + n].copy_from_slice(&self.words[word].load(Relaxed).to_le_bytes()[skip..skip + n]);
            at += n;
        }
    }

    pub(crate) fn copy_in(&self, offset: usize, bytes: &[u8]) {
        let mut at = 0;
        while at < bytes.len() {
            let skip = (offset + at) & 7;
            if skip == 0 && bytes.len() - at >= 8 {
                let chunk = bytes[at..at + 8].try_into().unwrap_or_default();
                self.words[(offset + at) >> 3].store(u64::from_le_bytes(chunk), Relaxed);
                at += 8;
            } else {
                self.store::<1>(offset + at, [bytes[at]]);
                at += 1;
            }
        }
    }
}

/// One bit per byte (or per sector).
pub(crate) struct Bitmap {
    words: Box<[AtomicU64]>,
}

impl Bitmap {
    fn new(bits: usize) -> Bitmap {
        Bitmap { words: zeroed(bits / 64 + 2) }
    }

    /// Whether `n` bits (at most 64, not crossing a word) are all set.
    #[inline(always)]
    pub(crate) fn has(&self, at: usize, n: usize) -> bool {
        let mask = (!0u64 >> (64 - n)) << (at & 63);
        self.words[at >> 6].load(Relaxed) & mask == mask
    }

    #[inline(always)]
    pub(crate) fn set(&self, at: usize, n: usize) {
        let mask = (!0u64 >> (64 - n)) << (at & 63);
        let word = &self.words[at >> 6];
        if word.load(Relaxed) & mask != mask {
            word.fetch_or(mask, Relaxed);
        }
    }

    fn pieces(at: usize, n: usize) -> impl Iterator<Item = (usize, usize)> {
        let mut at = at;
        let end = at + n;
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let piece = (at, (64 - (at & 63)).min(end - at));
                at += piece.1;
                piece
            })
        })
    }

    pub(crate) fn has_range(&self, at: usize, n: usize) -> bool {
        Self::pieces(at, n).all(|(at, n)| self.has(at, n))
    }

    pub(crate) fn set_range(&self, at: usize, n: usize) {
        Self::pieces(at, n).for_each(|(at, n)| self.set(at, n));
    }

    /// Offset from `at` of the first clear bit.
    pub(crate) fn first_clear(&self, at: usize, n: usize) -> Option<usize> {
        (0..n).find(|&i| !self.has(at + i, 1))
    }

    fn add(&self, other: &Bitmap) {
        for (word, more) in self.words.iter().zip(&other.words) {
            let more = more.load(Relaxed);
            if more != 0 {
                word.fetch_or(more, Relaxed);
            }
        }
    }

    fn clear(&self) {
        for word in &self.words {
            if word.load(Relaxed) != 0 {
                word.store(0, Relaxed);
            }
        }
    }

    fn count(&self) -> u64 {
        self.words.iter().map(|w| w.load(Relaxed).count_ones() as u64).sum()
    }
}

/// A live allocation.
pub(crate) struct Allocation {
    pub base: u64,
    pub len: usize,
    pub label: String,
    pub read_only: bool,
    pub bytes: Bytes,
    init: Bitmap,
    /// The host wrote all of it: no need to look at `init`.
    full: AtomicBool,
    /// Per 4 bytes: launch (32 bits), block (28 bits), which of the bytes (4 bits).
    owners: Box<[AtomicU64]>,
    read_sectors: Bitmap,
    written_sectors: Bitmap,
    read_in_launch: AtomicBool,
    written_in_launch: AtomicBool,
    /// Sectors that earlier launches, which may not have ended, read and wrote.
    earlier_read: Bitmap,
    earlier_written: Bitmap,
    any_earlier: AtomicBool,
}

/// Sector of the L2 and of DRAM, the unit of global traffic.
pub(crate) const SECTOR: usize = 32;

impl Allocation {
    fn new(base: u64, len: usize, label: &str, read_only: bool) -> Allocation {
        Allocation {
            base,
            len,
            label: label.to_string(),
            read_only,
            bytes: Bytes::new(len),
            init: Bitmap::new(len),
            full: AtomicBool::new(false),
            owners: zeroed(len.div_ceil(4)),
            read_sectors: Bitmap::new(len.div_ceil(SECTOR)),
            written_sectors: Bitmap::new(len.div_ceil(SECTOR)),
            read_in_launch: AtomicBool::new(false),
            written_in_launch: AtomicBool::new(false),
            earlier_read: Bitmap::new(len.div_ceil(SECTOR)),
            earlier_written: Bitmap::new(len.div_ceil(SECTOR)),
            any_earlier: AtomicBool::new(false),
        }
    }

    /// Offset of an access, if all of it is inside.
    #[inline(always)]
    pub(crate) fn offset(&self, address: u64, size: usize) -> Option<usize> {
        let offset = address.wrapping_sub(self.base) as usize;
        (offset < self.len && size <= self.len - offset).then_some(offset)
    }

    #[inline(always)]
    pub(crate) fn is_init(&self, offset: usize, n: usize) -> bool {
        self.full.load(Relaxed) || self.init.has(offset, n)
    }

    pub(crate) fn is_init_range(&self, offset: usize, n: usize) -> bool {
        self.full.load(Relaxed) || self.init.has_range(offset, n)
    }

    pub(crate) fn first_uninit(&self, offset: usize, n: usize) -> Option<usize> {
        if self.full.load(Relaxed) {
            return None;
        }
        self.init.first_clear(offset, n)
    }

    #[inline(always)]
    pub(crate) fn set_init(&self, offset: usize, n: usize) {
        if !self.full.load(Relaxed) {
            self.init.set(offset, n);
        }
    }

    pub(crate) fn set_init_range(&self, offset: usize, n: usize) {
        if !self.full.load(Relaxed) {
            if n == self.len {
                self.full.store(true, Relaxed);
            }
            self.init.set_range(offset, n);
        }
    }

    pub(crate) fn touch_read(&self, offset: usize, n: usize) {
        if !self.read_in_launch.load(Relaxed) {
            self.read_in_launch.store(true, Relaxed);
        }
        let first = offset / SECTOR;
        self.read_sectors.set_range(first, (offset + n - 1) / SECTOR - first + 1);
    }

    pub(crate) fn touch_written(&self, offset: usize, n: usize) {
        if !self.written_in_launch.load(Relaxed) {
            self.written_in_launch.store(true, Relaxed);
        }
        let first = offset / SECTOR;
        self.written_sectors.set_range(first, (offset + n - 1) / SECTOR - first + 1);
    }

    /// Whether launches before, which may not have ended, wrote these bytes, or read what is to be written.
    pub(crate) fn earlier(&self, offset: usize, n: usize, write: bool) -> bool {
        if !self.any_earlier.load(Relaxed) {
            return false;
        }
        let sectors = offset / SECTOR..(offset + n).div_ceil(SECTOR);
        sectors.into_iter().any(|s| self.earlier_written.has(s, 1) || write && self.earlier_read.has(s, 1))
    }

    /// Notes that `block` writes bytes of one 4-byte granule in a launch; another block that wrote one of them, if any.
    #[inline(always)]
    pub(crate) fn claim(&self, granule: usize, bytes: u64, launch: u32, block: u32) -> Option<u32> {
        let cell = &self.owners[granule];
        let stamp = (launch as u64) << 32 | (block as u64) << 4;
        let mut old = cell.load(Relaxed);
        loop {
            let mine = old & !15 == stamp;
            let new = if mine { old | bytes } else { stamp | bytes };
            if new == old {
                return None;
            }
            match cell.compare_exchange_weak(old, new, Relaxed, Relaxed) {
                Ok(_) => {
                    // Neighbouring bytes of one granule may belong to two blocks; only a shared byte is a race.
                    let other = old >> 32 == launch as u64 && !mine && old & bytes != 0;
                    return other.then_some((old as u32) >> 4);
                }
                Err(now) => old = now,
            }
        }
    }
}

/// What is at an address.
pub(crate) enum Slot {
    Live(Box<Allocation>),
    Freed {
        base: u64,
        len: usize,
        label: String,
    },
    /// Second and later slots of an allocation above 4 GiB.
    Continues(usize),
}

/// The table of allocations.
#[derive(Default)]
pub(crate) struct Memory {
    slots: Vec<Slot>,
    used: usize,
}

/// Launch-wide totals of distinct sectors.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Touched {
    pub read: u64,
    pub written: u64,
}

impl Memory {
    /// Bytes in live allocations.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    pub(crate) fn alloc(&mut self, len: usize, label: &str, read_only: bool) -> u64 {
        let first = self.slots.len();
        let base = ((FIRST_SLOT + first as u64) << SLOT_SHIFT) + LEAD;
        self.slots.push(Slot::Live(Box::new(Allocation::new(base, len, label, read_only))));
        // One more slot than the data spans, as the guard behind.
        for _ in 0..((len as u64 + LEAD) >> SLOT_SHIFT) {
            self.slots.push(Slot::Continues(first));
        }
        self.used += len;
        base
    }

    pub(crate) fn free(&mut self, address: u64) -> Result<(), MemoryError> {
        let index = (address >> SLOT_SHIFT).wrapping_sub(FIRST_SLOT) as usize;
        match self.slots.get_mut(index) {
            Some(slot @ Slot::Live(_)) => {
                let Slot::Live(a) = &*slot else { unreachable!() };
                if a.base != address {
                    return Err(MemoryError::NotAllocated { address });
                }
                self.used -= a.len;
                *slot = Slot::Freed { base: a.base, len: a.len, label: a.label.clone() };
                Ok(())
            }
            _ => Err(MemoryError::NotAllocated { address }),
        }
    }

    /// The live allocation that an address belongs to, if its slot has one.
    #[inline(always)]
    pub(crate) fn find(&self, address: u64) -> Option<&Allocation> {
        let index = (address >> SLOT_SHIFT).wrapping_sub(FIRST_SLOT) as usize;
        match self.slots.get(index) {
            Some(Slot::Live(a)) => Some(a),
            Some(Slot::Continues(first)) => match &self.slots[*first] {
                Slot::Live(a) => Some(a),
                _ => None,
            },
            _ => None,
        }
    }

    /// The allocation that was freed at an address.
    pub(crate) fn freed(&self, address: u64) -> Option<&str> {
        let index = (address >> SLOT_SHIFT).wrapping_sub(FIRST_SLOT) as usize;
        match self.slots.get(index) {
            Some(Slot::Freed { base, len, label }) if address.wrapping_sub(*base) < *len as u64 => {
                Some(label)
            }
            _ => None,
        }
    }

    /// In words, how an address lies to the nearest allocation.
    pub(crate) fn nearest(&self, address: u64) -> String {
        let index = (address >> SLOT_SHIFT).wrapping_sub(FIRST_SLOT) as usize;
        let found = self.find(address).or_else(|| {
            let near = [index.wrapping_sub(1), index.wrapping_add(1)];
            near.into_iter().find_map(|i| match self.slots.get(i) {
                Some(Slot::Live(a)) => Some(&**a),
                _ => None,
            })
        });
        match found {
            _ if address < 4096 => "a null pointer".into(),
            Some(a) if address < a.base => {
                format!("{} bytes before `{}` of {}", a.base - address, a.label, a.len)
            }
            Some(a) if address - a.base >= a.len as u64 => {
                format!(
                    "{} bytes behind the end of `{}` of {}",
                    address - a.base - a.len as u64,
                    a.label,
                    a.len
                )
            }
            Some(a) => format!("at byte {} of `{}` of {}", address - a.base, a.label, a.len),
            None => "far from every allocation".into(),
        }
    }

    fn host(&self, address: u64, bytes: usize) -> Result<(&Allocation, usize), MemoryError> {
        self.find(address).and_then(|a| a.offset(address, bytes).map(|o| (a, o))).ok_or_else(|| {
            let nearest = match self.freed(address) {
                Some(label) => format!("in `{label}`, which was freed"),
                None => self.nearest(address),
            };
            MemoryError::OutOfBounds { address, bytes, nearest }
        })
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let (a, offset) = self.host(address, bytes.len())?;
        a.bytes.copy_in(offset, bytes);
        a.set_init_range(offset, bytes.len());
        Ok(())
    }

    pub(crate) fn read(&self, address: u64, out: &mut [u8], checked: bool) -> Result<(), MemoryError> {
        if out.is_empty() {
            return Ok(());
        }
        let (a, offset) = self.host(address, out.len())?;
        if checked
            && let Some(at) = (!a.is_init_range(offset, out.len())).then(|| a.first_uninit(offset, out.len()))
        {
            return Err(MemoryError::Uninitialized {
                label: a.label.clone(),
                offset: offset + at.unwrap_or(0),
            });
        }
        a.bytes.copy_out(offset, out);
        Ok(())
    }

    fn live(&self) -> impl Iterator<Item = &Allocation> {
        self.slots.iter().filter_map(|s| match s {
            Slot::Live(a) => Some(&**a),
            _ => None,
        })
    }

    /// Distinct sectors touched since the last call; starts anew.
    pub(crate) fn take_touched(&self) -> Touched {
        let mut touched = Touched::default();
        for a in self.live() {
            if a.read_in_launch.swap(false, Relaxed) {
                touched.read += a.read_sectors.count();
                a.earlier_read.add(&a.read_sectors);
                a.read_sectors.clear();
                a.any_earlier.store(true, Relaxed);
            }
            if a.written_in_launch.swap(false, Relaxed) {
                touched.written += a.written_sectors.count();
                a.earlier_written.add(&a.written_sectors);
                a.written_sectors.clear();
                a.any_earlier.store(true, Relaxed);
            }
        }
        touched
    }

    /// All launches so far have ended.
    pub(crate) fn forget_earlier(&self) {
        for a in self.live().filter(|a| a.any_earlier.swap(false, Relaxed)) {
            a.earlier_read.clear();
            a.earlier_written.clear();
        }
    }
}
