"""Sign-in shaped like Amazon Cognito's `InitiateAuth`, and the check of Bearer tokens on every worker route."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool

from mock_api.context import Context, Parts
from mock_api.tokens import Caller

WORKERS = "workers"  # the group that may use the API (S16)
CLOUD = "cloud"  # the group whose accounts are of the environment of that name (S21)
TARGET = "AWSCognitoIdentityProviderService.InitiateAuth"

router = APIRouter()


class _InitiateAuth(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    flow: str = Field(alias="AuthFlow")
    client: str = Field(alias="ClientId")
    parameters: dict[str, str] = Field(alias="AuthParameters")


async def worker(parts: Parts, request: Request, authorization: Annotated[str | None, Header()] = None) -> Caller:
    """The worker that calls. 401: no good token, 403: not in the group `workers` (PROTOCOL.md S16)."""
    scheme, _, token = (authorization or "").partition(" ")
    caller = parts.tokens.caller(token.strip()) if scheme.lower() == "bearer" else None
    refusal = 401 if caller is None else 403 if WORKERS not in caller.groups else None
    if caller is None or refusal is not None:
        note = f"{request.method} {request.url.path}"
        parts.store.note("refused", account=caller.name if caller else None, code=refusal, note=note)
    if caller is None:
        raise HTTPException(401, "Not authenticated")
    if refusal is not None:
        raise HTTPException(403, f"Not a member of the '{WORKERS}' group")
    return caller


Worker = Annotated[Caller, Depends(worker)]


@router.get("/access_info")
async def access_info(parts: Parts) -> dict[str, dict[str, str]]:
    """Where to sign in."""
    known = parts.settings
    return {
        "cognito": {"user_pool_id": known.user_pool_id, "client_id": known.client_id, "region": known.region},
    }


@router.post("/")
async def initiate_auth(
    parts: Parts, request: Request, x_amz_target: Annotated[str | None, Header()] = None
) -> JSONResponse:
    """Cognito's `InitiateAuth`, for the flows USER_PASSWORD_AUTH, REFRESH_TOKEN_AUTH and REFRESH_TOKEN."""
    if x_amz_target != TARGET:
        return _refused("UnknownOperationException", "")
    try:
        wanted = _InitiateAuth.model_validate_json(await request.body())
    except ValidationError:
        return _refused("InvalidParameterException", "Missing required parameter")
    return await run_in_threadpool(_sign_in, parts, wanted)


def _sign_in(parts: Context, wanted: _InitiateAuth) -> JSONResponse:
    result: dict[str, Any] | None
    if wanted.client != parts.settings.client_id:
        return _refused("ResourceNotFoundException", f"User pool client {wanted.client} does not exist.")
    given = wanted.parameters
    account = given.get("USERNAME")
    if wanted.flow == "USER_PASSWORD_AUTH":
        if not account or "PASSWORD" not in given:
            return _refused("InvalidParameterException", "Missing required parameter USERNAME or PASSWORD")
        result, complaint = parts.tokens.sign_in(account, given["PASSWORD"]), "Incorrect username or password."
    elif wanted.flow in ("REFRESH_TOKEN_AUTH", "REFRESH_TOKEN"):
        result, complaint = parts.tokens.refresh(given.get("REFRESH_TOKEN", "")), "Invalid Refresh Token"
    else:
        return _refused("InvalidParameterException", f"Unsupported AuthFlow {wanted.flow}")
    parts.store.note("sign_in", account=account, code=400 if result is None else 200, note=wanted.flow)
    if result is None:
        return _refused("NotAuthorizedException", complaint)
    return _amz_json(200, {"AuthenticationResult": result, "ChallengeParameters": {}})


def _refused(kind: str, message: str) -> JSONResponse:
    answer = _amz_json(400, {"__type": kind, "message": message})
    answer.headers["x-amzn-ErrorType"] = f"{kind}:"
    return answer


def _amz_json(status: int, content: dict[str, Any]) -> JSONResponse:
    return JSONResponse(content, status, media_type="application/x-amz-json-1.1")
