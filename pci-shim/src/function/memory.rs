//! The guest's memory, as a function's owner gives it to the device, and as the device asks the owner to reach what it cannot.
//!
//! `map` of 512 MiB at 0 lets the device DMA there; a store to memory that cannot be shared comes out of `next_mediation`, and `answer` says that it is made; after an
//! `unmap` returned, nobody touches the range.

use std::sync::Arc;

use farbus_remote_dma::dirty_log::{DirtyLog, PAGE_BYTES};
use farbus_remote_dma::{Iova, MapError, MediationAnswer, Ticket, Window, WindowMemory};
use farbus_transport::Memory;

use super::Function;
use crate::irq::IrqSink;
use crate::mediation::MediationRequest;

impl<S: IrqSink> Function<S> {
    /// Lets the device use a range of DMA addresses.
    ///
    /// # Errors
    /// [`MapError`]; nothing was mapped.
    pub fn map(&mut self, window: Window) -> Result<(), MapError> {
        self.map_changes += 1;
        self.release_lazy();
        if let WindowMemory::Mapped { memory, .. } = &window.memory
            && !self.memories.iter().any(|known| std::ptr::eq(known.as_ptr(), Arc::as_ptr(memory)))
        {
            self.memories.retain(|known| known.strong_count() > 0);
            self.memories.push(Arc::downgrade(memory));
        }
        let mut mapped = self.attachment.map(window.clone(), &mut self.front);
        if self.is_lost() {
            // Told to the device that takes its place.
            mapped = Ok(());
        }
        // The attachment's book has the same windows, so this one cannot refuse what that one took.
        let mapped = mapped.and_then(|()| self.windows.insert(window));
        self.settle();
        mapped
    }

    /// Takes every window inside a range away. When it returns, neither the device nor [`Function::next_mediation`] touches the range;
    /// what was handed out before is the owner's to end first.
    ///
    /// # Errors
    /// [`MapError`]; nothing was taken.
    pub fn unmap(&mut self, iova: Iova, len: u64) -> Result<(), MapError> {
        self.map_changes += 1;
        self.release_lazy();
        let mut unmapped = self.attachment.unmap(iova, len, &mut self.front);
        if self.is_lost() {
            // The link's end took all memory back; which windows there are, the function's own book says.
            unmapped = Ok(());
        }
        if unmapped.is_ok() {
            self.front.mediations.withdraw(iova, len);
        }
        let unmapped = unmapped.and_then(|()| self.windows.remove(iova, len));
        self.settle();
        unmapped
    }

    /// Says that `memory` is what the guest sees: its windows need no mediation from now on.
    pub fn prove(&mut self, memory: &Arc<Memory>) {
        self.windows.prove(memory);
        self.attachment.prove(memory, &mut self.front);
        self.settle();
    }

    /// The next access to guest memory that the owner must make. Interrupts that the device raised after a store wait for its answer.
    pub fn next_mediation(&mut self) -> Option<MediationRequest> {
        let request = self.front.mediations.take()?;
        self.front.counters.mediations += 1;
        Some(request)
    }

    /// The outcome of a mediation that was handed out. Anything that does not fit the request counts as a fault.
    pub fn answer(&mut self, ticket: Ticket, answer: MediationAnswer<'_>) {
        let Some(answer) = self.front.mediations.close(ticket, answer) else {
            tracing::error!(?ticket, "an answer to no mediation");
            return;
        };
        self.attachment.answer(ticket, answer, &mut self.front);
        self.settle();
    }

    /// The pages that the device wrote in `memory`, complete up to this call; `None` where `memory` has no window and nothing is left to take
    /// of one that it had.
    pub fn dirty_log(&mut self, memory: &Arc<Memory>) -> Option<&DirtyLog> {
        let Some(carried) = self.carried.of(memory) else { return self.attachment.dirty_log(memory, &mut self.front) };
        // With what devices wrote that were lost since.
        let Some(log) = self.attachment.dirty_log(memory, &mut self.front) else { return Some(carried) };
        carried.take(|page| log.mark(page * PAGE_BYTES, PAGE_BYTES));
        Some(log)
    }
}
