//! `/v1/models`: what is served here.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;

use super::errors::ApiError;
use crate::service::Service;

#[derive(Debug, Serialize)]
pub(super) struct ModelList {
    object: &'static str,
    data: Vec<ModelObject>,
}

#[derive(Debug, Serialize)]
pub(super) struct ModelObject {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// Tokens of prompt and completion together, under the name that vLLM gave it.
    max_model_len: usize,
}

pub(super) async fn list(State(service): State<Arc<Service>>) -> Json<ModelList> {
    Json(ModelList { object: "list", data: vec![object(&service)] })
}

pub(super) async fn one(
    State(service): State<Arc<Service>>,
    Path(id): Path<String>,
) -> Result<Json<ModelObject>, ApiError> {
    service.model.check_name(Some(&id)).map_err(ApiError)?;
    Ok(Json(object(&service)))
}

fn object(service: &Service) -> ModelObject {
    ModelObject {
        id: service.model.id.clone(),
        object: "model",
        created: service.created_unix_s,
        owned_by: "trireme",
        max_model_len: service.model.config.max_position_embeddings,
    }
}
