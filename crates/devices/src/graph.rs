//! Launches that were recorded, to be run again and again.

/// What [`Device::capture`](crate::Device::capture) has recorded.
pub struct Graph {
    replay: Box<dyn Replay>,
}

impl Graph {
    pub(crate) fn new(replay: Box<dyn Replay>) -> Self {
        Self { replay }
    }

    /// Enqueues all launches, in their order.
    ///
    /// # Safety
    /// The buffers that the recorded calls were given are alive until the launches have completed, and no one borrows those
    /// that they write.
    pub unsafe fn launch(&self) {
        // SAFETY: the caller's promise.
        unsafe { self.replay.launch() }
    }
}

pub(crate) trait Replay {
    /// # Safety
    /// As [`Graph::launch`].
    unsafe fn launch(&self);
}
