//! Memory and operators on a device; all unsafe arithmetic ends here.
