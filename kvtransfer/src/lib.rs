//! A sequence's KV blocks from one worker to another: ticket, layout, fence, progress, failure.
