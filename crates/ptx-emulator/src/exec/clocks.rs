//! Who knows of whose accesses: vector clocks of the warps of a cluster, for finding races.
//!
//! Time is one counter per cluster that steps at every synchronisation. An access at time `t` of warp `w` happened
//! before what warp `u` does now if and only if `known(u, w) > t`.

pub(crate) struct Clocks {
    now: u32,
    warps: usize,
    known: Vec<u32>,
}

/// What a warp knew when it released something, for whoever acquires it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Released(Vec<u32>);

impl Clocks {
    pub(crate) fn new() -> Clocks {
        Clocks { now: 0, warps: 0, known: Vec::new() }
    }

    /// A new cluster begins: everything earlier is known to all. False if time is about to run out.
    pub(crate) fn restart(&mut self, warps: usize) -> bool {
        if self.now > 1 << 27 {
            return false;
        }
        self.now += 1;
        self.warps = warps;
        self.known.clear();
        self.known.resize(warps * warps, self.now);
        true
    }

    pub(crate) fn reset(&mut self) {
        self.now = 0;
    }

    #[inline(always)]
    pub(crate) fn now(&self) -> u32 {
        self.now
    }

    pub(crate) fn warps(&self) -> usize {
        self.warps
    }

    /// The row of what a warp knows of every other.
    #[inline(always)]
    pub(crate) fn of(&self, warp: usize) -> &[u32] {
        &self.known[warp * self.warps..(warp + 1) * self.warps]
    }

    fn of_mut(&mut self, warp: usize) -> &mut [u32] {
        &mut self.known[warp * self.warps..(warp + 1) * self.warps]
    }

    /// The lanes of a warp meet.
    pub(crate) fn sync_warp(&mut self, warp: usize) {
        self.now += 1;
        let now = self.now;
        self.of_mut(warp)[warp] = now;
    }

    /// What a warp did so far, to be published.
    pub(crate) fn release(&mut self, warp: usize) -> Released {
        self.now += 1;
        let mut row = self.of(warp).to_vec();
        row[warp] = self.now;
        Released(row)
    }

    pub(crate) fn acquire(&mut self, warp: usize, from: &Released) {
        for (mine, &theirs) in self.of_mut(warp).iter_mut().zip(&from.0) {
            *mine = (*mine).max(theirs);
        }
    }
}

impl Released {
    pub(crate) fn join(&mut self, other: &Released) {
        if self.0.is_empty() {
            self.0.clone_from(&other.0);
            return;
        }
        for (mine, &theirs) in self.0.iter_mut().zip(&other.0) {
            *mine = (*mine).max(theirs);
        }
    }
}
