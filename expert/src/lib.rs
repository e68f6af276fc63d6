//! Physical experts and their computation; the dispatch/combine client; placement and its balancer.
