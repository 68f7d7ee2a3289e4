//! Tells the guest what others change in the folders and files that it shares with the host: virtio-fs has no
//! word for it, and people edit on the host what a container watches.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent_protocol::{Change, ChangeKind, REPEATING_GROUP, Request as Order};
use vmm::changes::{self, Changes, Telling};

use super::agent::Asker;
use super::serve::Serving;
use super::share::ShareTree;

/// How long changes are collected: a file is seldom written in one piece.
const QUIET: Duration = Duration::from_millis(50);

/// Most changes that wait, and most in one request.
const MAX_CHANGES: usize = 4096;
const AT_ONCE: usize = 256;

/// What the guest has not been told yet.
#[derive(Debug, Default)]
pub(super) struct Untold {
    /// When to tell it.
    pub(super) tell_at: Option<Instant>,
    changes: Vec<changes::Change>,
    /// Whether the agent has not answered yet.
    asked: bool,
}

/// How changes below the folder of all mounts are told.
pub(super) fn telling() -> io::Result<Telling> {
    let to = Arc::new(Changes::new()?);
    Ok(Telling { below: ShareTree::MOUNTS.into(), first_group: REPEATING_GROUP, to })
}

impl Serving<'_> {
    /// Others have changed files.
    pub(super) fn files_changed(&mut self) {
        let Some(changes) = self.parts.vm.changes() else { return };
        let untold = &mut self.untold;
        let room = MAX_CHANGES - untold.changes.len();
        untold.changes.extend(changes.take().into_iter().take(room));
        untold.tell_at.get_or_insert_with(|| Instant::now() + QUIET);
    }

    /// Tells the guest of them, a part at a time.
    pub(super) fn tell_changes(&mut self) {
        let untold = &mut self.untold;
        untold.tell_at = None;
        if untold.asked {
            // The answer comes back here.
            return;
        }
        let count = untold.changes.len().min(AT_ONCE);
        let changes: Vec<_> = untold.changes.drain(..count).map(message).collect();
        if !changes.is_empty() {
            untold.asked = true;
            self.ask(&Order::Repeat(changes), Asker::Changes);
        }
    }

    /// The agent has heard of them.
    pub(super) fn changes_told(&mut self) {
        self.untold.asked = false;
        self.tell_changes();
    }
}

fn message(change: changes::Change) -> Change {
    let kind = match change.kind {
        changes::ChangeKind::Made { mode } => ChangeKind::Made(mode),
        changes::ChangeKind::Written => ChangeKind::Written,
        changes::ChangeKind::Attributes => ChangeKind::Attributes,
        changes::ChangeKind::Removed { is_directory } => ChangeKind::Removed { is_directory },
        changes::ChangeKind::Moved { folder, name } => ChangeKind::Moved(folder.into(), name),
    };
    Change { folder: change.folder.into(), name: change.name, kind }
}
