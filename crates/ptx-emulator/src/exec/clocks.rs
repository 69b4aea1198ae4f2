//! Who knows of whose accesses: vector clocks of the warps of a cluster, for finding races.
//!
//! Time is one counter per cluster that steps at every synchronisation. An access at time `t` of warp `w` happened
//! before what warp `u` does now if and only if `known(u, w) > t`. Behind the warps come the agents that copy bulks, one
//! per block: they only publish.

use std::collections::HashMap;

pub(crate) struct Clocks {
    now: u32,
    warps: usize,
    /// Entries of a row: warps and agents.
    width: usize,
    known: Vec<u32>,
    /// The same for what proxy fences have handed to asynchronous work; empty where there is none.
    fenced: Vec<u32>,
    /// By warp: what its last fence published.
    fences: Vec<Option<Released>>,
    /// By warp: the grids before this one are known to have ended.
    dependency: Vec<bool>,
    /// By warp: times of single lanes that it knows of beyond `known`, by [`lane_code`].
    lanes: Vec<HashMap<u32, u32>>,
}

/// A lane of a warp of the cluster.
pub(crate) fn lane_code(warp: usize, lane: usize) -> u32 {
    (warp << 5 | lane) as u32
}

/// What a warp knew when it released something, for whoever acquires it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Released {
    known: Vec<u32>,
    fenced: Vec<u32>,
    dependency: bool,
    lanes: Vec<(u32, u32)>,
}

fn join(mine: &mut [u32], theirs: &[u32]) {
    for (mine, &theirs) in mine.iter_mut().zip(theirs) {
        *mine = (*mine).max(theirs);
    }
}

impl Clocks {
    pub(crate) fn new() -> Clocks {
        Clocks {
            now: 0,
            warps: 0,
            width: 0,
            known: Vec::new(),
            fenced: Vec::new(),
            fences: Vec::new(),
            dependency: Vec::new(),
            lanes: Vec::new(),
        }
    }

    /// A new cluster begins: everything earlier is known to all. False if time is about to run out.
    pub(crate) fn restart(
        &mut self,
        warps: usize,
        agents: usize,
        asynchronous: bool,
        dependency: bool,
    ) -> bool {
        if self.now > 1 << 27 {
            return false;
        }
        self.now += 1;
        self.warps = warps;
        self.width = warps + agents;
        self.known.clear();
        self.known.resize(warps * self.width, self.now);
        self.fenced.clear();
        if asynchronous {
            self.fenced.resize(warps * self.width, self.now);
        }
        self.fences.clear();
        self.fences.resize(warps, None);
        self.dependency.clear();
        self.dependency.resize(warps, dependency);
        self.lanes.iter_mut().for_each(HashMap::clear);
        self.lanes.resize(warps, HashMap::new());
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
        &self.known[warp * self.width..(warp + 1) * self.width]
    }

    /// The row of what asynchronous work of a warp may read.
    pub(crate) fn fenced(&self, warp: usize) -> &[u32] {
        self.fenced.get(warp * self.width..(warp + 1) * self.width).unwrap_or_default()
    }

    fn of_mut(&mut self, warp: usize) -> &mut [u32] {
        &mut self.known[warp * self.width..(warp + 1) * self.width]
    }

    /// A time after everything so far.
    pub(crate) fn tick(&mut self) -> u32 {
        self.now += 1;
        self.now
    }

    /// The lanes of a warp meet.
    pub(crate) fn sync_warp(&mut self, warp: usize) {
        self.now += 1;
        let now = self.now;
        self.of_mut(warp)[warp] = now;
    }

    /// What the lanes `by` of a warp did so far, to be published; of the warp's `live` other lanes, only what they did before
    /// they last met.
    pub(crate) fn release(&mut self, warp: usize, by: u32, live: u32) -> Released {
        self.now += 1;
        let mut known = self.of(warp).to_vec();
        let mut lanes: Vec<(u32, u32)> = self.lanes[warp].iter().map(|(&code, &time)| (code, time)).collect();
        if by & live == live {
            known[warp] = self.now;
        } else {
            lanes.extend(super::access::lanes(by).map(|lane| (lane_code(warp, lane), self.now)));
        }
        Released { known, fenced: self.fenced(warp).to_vec(), dependency: self.dependency[warp], lanes }
    }

    /// Whether a warp knows, from that lane itself, of what the lane did at a time.
    #[cold]
    pub(crate) fn knows_lane(&self, warp: usize, code: u32, time: u32) -> bool {
        self.lanes[warp].get(&code).is_some_and(|&known| known > time)
    }

    /// Whether it knows so from all the lanes of a mask.
    #[cold]
    pub(crate) fn knows_lanes(&self, warp: usize, of: usize, lanes: u32, time: u32) -> bool {
        super::access::lanes(lanes).all(|lane| self.knows_lane(warp, lane_code(of, lane), time))
    }

    /// Whether it knows so from any lane: enough for what the warp did as a whole.
    #[cold]
    pub(crate) fn knows_any_lane(&self, warp: usize, of: usize, time: u32) -> bool {
        (0..32).any(|lane| self.knows_lane(warp, lane_code(of, lane), time))
    }

    /// What a warp's last fence published: all that a relaxed arrival hands on.
    pub(crate) fn release_fence(&self, warp: usize) -> Option<&Released> {
        self.fences[warp].as_ref()
    }

    /// A memory fence: what came before it may be published by a relaxed arrival.
    pub(crate) fn fence(&mut self, warp: usize, by: u32, live: u32) {
        self.fences[warp] = Some(self.release(warp, by, live));
    }

    /// A proxy fence: asynchronous work may read what the warp knows of.
    pub(crate) fn fence_proxy(&mut self, warp: usize) {
        self.now += 1;
        let start = warp * self.width;
        let range = start..start + self.width;
        if self.fenced.is_empty() {
            return;
        }
        self.fenced[range.clone()].copy_from_slice(&self.known[range]);
        self.fenced[start + warp] = self.now;
    }

    /// An agent has written something, at the time that is returned; whoever acquires the rest knows of it.
    pub(crate) fn complete(&mut self, agent: usize) -> (u32, Released) {
        let at = self.now;
        self.now += 1;
        let mut known = vec![0; self.width];
        known[agent] = self.now;
        (at, Released { known, ..Released::default() })
    }

    pub(crate) fn acquire(&mut self, warp: usize, from: &Released) {
        join(self.of_mut(warp), &from.known);
        let range = warp * self.width..(warp + 1) * self.width;
        if let Some(mine) = self.fenced.get_mut(range) {
            join(mine, &from.fenced);
        }
        self.dependency[warp] |= from.dependency;
        for &(code, time) in &from.lanes {
            let known = self.lanes[warp].entry(code).or_default();
            *known = (*known).max(time);
        }
    }

    /// `griddepcontrol.wait`
    pub(crate) fn depend(&mut self, warp: usize) {
        self.dependency[warp] = true;
    }

    /// Whether the grids before this one are known to have ended.
    #[inline(always)]
    pub(crate) fn depended(&self, warp: usize) -> bool {
        self.dependency[warp]
    }
}

impl Released {
    pub(crate) fn join(&mut self, other: &Released) {
        if self.known.is_empty() {
            self.clone_from(other);
            return;
        }
        join(&mut self.known, &other.known);
        if self.fenced.is_empty() {
            self.fenced.clone_from(&other.fenced);
        } else {
            join(&mut self.fenced, &other.fenced);
        }
        self.dependency |= other.dependency;
        for &(code, time) in &other.lanes {
            match self.lanes.iter_mut().find(|l| l.0 == code) {
                Some(mine) => mine.1 = mine.1.max(time),
                None => self.lanes.push((code, time)),
            }
        }
    }
}
