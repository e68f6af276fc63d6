//! The trireme binary: any role, or a whole cluster.
