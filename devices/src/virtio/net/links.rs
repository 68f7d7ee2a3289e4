//! The links of a device, one for each queue pair, of which the first few are in use.

use std::io;

use super::tap::Link;
use super::vhost::Vhost;
use crate::virtio::queue::VirtQueue;

/// The links of a device.
pub struct Links<L> {
    links: Vec<L>,
    /// Who moves the frames, if it is not us.
    vhost: Option<Vhost>,
    attached: usize,
}

impl<L: Link> Links<L> {
    /// `links` are all attached.
    pub fn new(links: Vec<L>) -> Self {
        Links { attached: links.len(), links, vhost: None }
    }

    /// Leaves moving the frames to the kernel.
    pub fn serve_by(&mut self, vhost: Vhost) {
        self.vhost = Some(vhost);
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.links.len()
    }

    /// How many of them, from the first on, get frames: those of the pairs the driver uses.
    pub fn attached(&self) -> usize {
        self.attached
    }

    /// Every link.
    pub fn all(&self) -> &[L] {
        &self.links
    }

    /// The kernel's side, if it moves the frames.
    pub fn vhost(&self) -> Option<&Vhost> {
        self.vhost.as_ref()
    }

    /// Begins with a driver that negotiated `features`, and only the first pair in use. `queues` are
    /// those the kernel is to serve, pair after pair, if it does.
    pub fn start(&mut self, queues: &[VirtQueue], features: u64) -> io::Result<()> {
        self.resize(1)?;
        let Some(vhost) = &mut self.vhost else { return Ok(()) };
        let started = vhost.set_up(queues, features).and_then(|()| vhost.start(0));
        started.inspect_err(|_| self.stop())
    }

    /// Ends with the driver: nobody touches its queues any more.
    pub fn stop(&mut self) {
        if let Some(vhost) = &mut self.vhost {
            vhost.stop_all();
        }
    }

    /// Has nobody touch the driver's queues until [`Links::resume`].
    pub fn pause(&mut self) {
        if let Some(vhost) = &mut self.vhost {
            vhost.pause();
        }
    }

    /// Goes on after [`Links::pause`].
    pub fn resume(&mut self) -> io::Result<()> {
        self.vhost.as_mut().map_or(Ok(()), Vhost::resume)
    }

    /// Attaches the first `count` links, and no other; changes nothing if that cannot be.
    pub fn use_pairs(&mut self, count: usize) -> io::Result<()> {
        let before = self.attached;
        self.resize(count).inspect_err(|_| {
            // Those that were in use before can be used again.
            let _ = self.resize(before);
        })
    }

    /// Where it fails, `attached` says how far it came.
    fn resize(&mut self, count: usize) -> io::Result<()> {
        while self.attached < count {
            self.links[self.attached].set_attached(true)?;
            self.attached += 1;
            if let Some(vhost) = &mut self.vhost {
                vhost.start(self.attached - 1)?;
            }
        }
        while self.attached > count {
            if let Some(vhost) = &mut self.vhost {
                vhost.stop(self.attached - 1);
            }
            self.links[self.attached - 1].set_attached(false)?;
            self.attached -= 1;
        }
        Ok(())
    }
}
