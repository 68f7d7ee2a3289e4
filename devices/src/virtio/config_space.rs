//! Where the drivers of a device read its configuration space.

use super::mmio::RegisterPage;

/// A device whose configuration space changes has one of these, and shows every change in it.
#[derive(Default)]
pub struct ConfigSpace(Option<RegisterPage>);

impl ConfigSpace {
    /// That of the device behind the registers in `page`.
    pub fn of(page: RegisterPage) -> Self {
        ConfigSpace(Some(page))
    }

    /// Shows `bytes` as the whole of it.
    pub fn show(&self, bytes: &[u8]) {
        if let Some(page) = &self.0 {
            page.set_config(bytes);
        }
    }
}
