//! What a device shows of its backend.

use std::sync::Arc;

use lora_kernels::Result;
use lora_kernels::cuda::{EncodedMap, Launch, Properties, Queue, TensorMap};

use crate::{Backend, launched};

/// The backend's queue, with properties that may be others for plans, and a record of what was launched.
pub(crate) struct Front {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) properties: Properties,
}

// SAFETY: the backend's queue, which keeps both promises; the memory is the backend's.
unsafe impl Queue for Front {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.backend.queue().launch(launch)? };
        launched::record(launch.kernel, self.properties.capability);
        Ok(())
    }

    unsafe fn upload(&self, destination: u64, bytes: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.backend.queue().upload(destination, bytes) }
    }

    fn encode(&self, map: &TensorMap<'_>) -> Result<EncodedMap> {
        self.backend.queue().encode(map)
    }
}
