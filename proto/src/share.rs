//! Whose share a sequence counts against, and what that means: the one order of waiting that router, prefill and decode
//! agree on, so that no tier takes back what another one granted.
//!
//! The router says who asks, from the API key and the request's class of service; workers believe it, as they believe
//! everything that comes over mutual TLS.

mod fair_queue;

pub use self::fair_queue::FairQueue;
use crate::field::FieldError;
use crate::v1;

/// Largest weight of a tenant.
pub const WEIGHT_MAX: u32 = 1000;

/// How much somebody minds waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Priority {
    /// Somebody watches: goes first.
    #[default]
    Interactive,
    /// Nobody watches: takes what is left, and never nothing.
    Batch,
}

impl Priority {
    /// Every class, the first to be served first.
    pub const ALL: [Self; 2] = [Self::Interactive, Self::Batch];

    /// Reads the wire's number.
    ///
    /// # Errors
    /// It is no class.
    pub fn from_wire(wire: i32) -> Result<Self, FieldError> {
        match v1::Priority::try_from(wire) {
            Ok(v1::Priority::Unspecified | v1::Priority::Interactive) => Ok(Self::Interactive),
            Ok(v1::Priority::Batch) => Ok(Self::Batch),
            Err(_) => Err(FieldError::out_of_range("priority", wire, "interactive or batch")),
        }
    }

    /// As metrics and logs spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Batch => "batch",
        }
    }
}

/// Whose a sequence is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Share {
    /// Follows from the API key; 0 where nobody has to say who they are.
    pub tenant: u64,
    /// The tenant's part of what is contended for, relative to the others': 1..=[`WEIGHT_MAX`].
    pub weight: u32,
    /// Its class.
    pub priority: Priority,
}

impl Default for Share {
    /// Of everybody, where no key is asked for.
    fn default() -> Self {
        Self { tenant: 0, weight: 1, priority: Priority::Interactive }
    }
}

impl Share {
    /// Reads a message; absent, it is everybody's: older routers know of no tenants.
    ///
    /// # Errors
    /// Names the field out of its range.
    pub fn from_wire(wire: Option<&v1::Share>) -> Result<Self, FieldError> {
        let Some(wire) = wire else { return Ok(Self::default()) };
        // proto3 cannot tell an absent weight from 0.
        let weight = wire.weight.max(1);
        if weight > WEIGHT_MAX {
            return Err(FieldError::out_of_range("weight", weight, format_args!("at most {WEIGHT_MAX}")));
        }
        let priority = Priority::from_wire(wire.priority)?;
        Ok(Self { tenant: wire.tenant, weight, priority })
    }

    /// The wire's form.
    pub fn to_wire(self) -> v1::Share {
        let priority = match self.priority {
            Priority::Interactive => v1::Priority::Interactive,
            Priority::Batch => v1::Priority::Batch,
        };
        v1::Share { tenant: self.tenant, weight: self.weight, priority: priority.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_survives_the_wire() {
        for priority in Priority::ALL {
            let share = Share { tenant: 7, weight: 3, priority };
            assert_eq!(Share::from_wire(Some(&share.to_wire())), Ok(share));
        }
        assert_eq!(Share::from_wire(None), Ok(Share::default()));
        assert_eq!(Share::from_wire(Some(&v1::Share::default())), Ok(Share::default()));
    }

    #[test]
    fn what_is_out_of_range_is_named() {
        let field = |wire: v1::Share| Share::from_wire(Some(&wire)).map_err(|error| error.field.to_string());
        let share = Share::default().to_wire();
        assert_eq!(field(v1::Share { weight: WEIGHT_MAX + 1, ..share }), Err("weight".to_owned()));
        assert_eq!(field(v1::Share { priority: 9, ..share }), Err("priority".to_owned()));
    }
}
