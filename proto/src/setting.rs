//! A worker's settings that are whole numbers in a range: one check and one message for every role's table.

/// A setting outside its range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{table}.{field} = {value}: must be {min}..={max}")]
pub struct OutOfRange {
    /// The role's table in the cluster's file.
    pub table: &'static str,
    /// Key in that table.
    pub field: &'static str,
    /// What it was set to.
    pub value: u64,
    /// Smallest value accepted.
    pub min: u64,
    /// Largest value accepted.
    pub max: u64,
}

/// Checks that `value` lies in `min..=max`.
///
/// # Errors
/// Names the table and the field.
pub fn within(
    table: &'static str,
    field: &'static str,
    value: u64,
    min: u64,
    max: u64,
) -> Result<(), OutOfRange> {
    if (min..=max).contains(&value) { Ok(()) } else { Err(OutOfRange { table, field, value, min, max }) }
}
