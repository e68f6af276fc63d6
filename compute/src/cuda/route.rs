//! The router's choice.

use super::experts::Sorted;
use super::launch::{Grid, launch, size};
use super::{CudaError, Device, Groups, LinearKernel, View, ViewMut};
use crate::{RoutingRule, Scoring, Selection};

/// What the router chooses by.
#[derive(Clone, Copy)]
pub struct Routing<'a> {
    /// `[slices, rows, experts]`, slices added in order.
    pub logits: View<'a, f32>,
    /// See [`Self::logits`].
    pub slices: usize,
    /// See [`Self::logits`].
    pub experts: usize,
    /// Rows from this one number on the device on are padding: their ids are `u16::MAX`, their weights zero.
    pub row_count: Option<View<'a, u32>>,
    /// `[experts]`, counts for the selection of [`Selection::NoauxTc`] only.
    pub bias: Option<View<'a, f32>>,
    /// How.
    pub rule: &'a RoutingRule,
}

impl Device {
    /// Chooses [`RoutingRule::top_k`] experts for each row: `ids` and `weights` `[rows, top_k]`, in descending order of the score
    /// they were selected by (bias included), ties by the lower id.
    ///
    /// # Panics
    /// If a length does not fit, `top_k` exceeds the experts of the groups kept, or groups do not divide the experts.
    pub fn route(
        &self,
        routing: Routing<'_>,
        ids: &mut ViewMut<'_, u16>,
        weights: &mut ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        self.route_into(routing, ids, weights, Sorted::default())
    }

    /// [`Self::route`] and [`Self::group_rows`] of the choices, for products by `kernel`: one launch where there is but one row.
    ///
    /// # Panics
    /// As either.
    pub fn route_and_group(
        &self,
        routing: Routing<'_>,
        ids: &mut ViewMut<'_, u16>,
        weights: &mut ViewMut<'_, f32>,
        kernel: LinearKernel,
        groups: &mut Groups,
    ) -> Result<(), CudaError> {
        let alone = ids.len() == routing.rule.top_k;
        let sorted = if alone { self.group_room(ids.len(), kernel, groups) } else { Sorted::default() };
        self.route_into(routing, ids, weights, sorted)?;
        if alone { Ok(()) } else { self.group_rows(ids.view(), kernel, groups) }
    }

    fn route_into(
        &self,
        Routing { logits, slices, experts, row_count, bias, rule }: Routing<'_>,
        ids: &mut ViewMut<'_, u16>,
        weights: &mut ViewMut<'_, f32>,
        sorted: Sorted,
    ) -> Result<(), CudaError> {
        if logits.is_empty() {
            return Ok(());
        }
        let (groups, kept) = match rule.selection {
            Selection::Greedy => (1, 1),
            _ => (rule.groups, rule.groups_kept),
        };
        assert!(experts > 0 && logits.len().is_multiple_of(experts), "{} logits of {experts}", logits.len());
        assert!(groups > 0 && experts.is_multiple_of(groups) && kept <= groups, "groups of experts");
        assert!(rule.top_k > 0 && rule.top_k <= kept * (experts / groups), "more chosen than eligible");
        assert!(slices > 0 && (logits.len() / experts).is_multiple_of(slices), "{slices} slices of rows");
        assert!(row_count.is_none_or(|count| !count.is_empty()), "a number of rows");
        let rows = logits.len() / experts / slices;
        assert!(ids.len() == rows * rule.top_k && weights.len() == ids.len(), "room for the choices");
        assert!(bias.is_none_or(|bias| bias.len() == experts), "a bias per expert");
        let bias = bias.filter(|_| rule.selection == Selection::NoauxTc).map_or(0, |bias| bias.address());
        let scoring = match rule.scoring {
            Scoring::Sigmoid => 0u32,
            Scoring::Softmax => 1,
        };
        let selection = match rule.selection {
            Selection::Greedy => 0u32,
            Selection::GroupLimitedGreedy => 1,
            Selection::NoauxTc => 2,
        };
        let grid = Grid::line(rows, 256).with_shared((2 * experts + groups) * size_of::<f32>());
        let row_count = row_count.map_or(0, |count| count.address());
        // SAFETY: a thread block a row; lengths checked above; a null bias is none.
        unsafe {
            launch!(self, route, grid;
                logits.address(), size(slices), size(experts), bias, scoring, selection, size(rule.top_k),
                size(groups), size(kept), u32::from(rule.normalise), rule.scale, row_count, ids.address(),
                weights.address(), sorted)
        }
    }
}
