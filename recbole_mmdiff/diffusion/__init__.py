"""Diffusion on vectors: schedules, the forward process, guidance, samplers and noise networks.

Plain torch and numpy; usable alone::

    from recbole_mmdiff.diffusion import dpm_solver, linear_schedule
"""

from recbole_mmdiff.diffusion.affine import AffineMap, collapse, sample
from recbole_mmdiff.diffusion.attention import StaticTokens, TokenAttention
from recbole_mmdiff.diffusion.conv_unet import ConvUNet
from recbole_mmdiff.diffusion.denoisers import (
    ACTIVATIONS,
    AffineParameters,
    MLPDenoiser,
    sinusoidal_embedding,
)
from recbole_mmdiff.diffusion.discrete import (
    DiscreteSchedule,
    cosine_schedule,
    discrete_schedule,
    exp_schedule,
    linear_schedule,
    sqrt_schedule,
)
from recbole_mmdiff.diffusion.guidance import drop_condition, guided_noise
from recbole_mmdiff.diffusion.noise import fold_in, keyed_normal, keyed_uniform
from recbole_mmdiff.diffusion.plans import (
    Plan,
    Stage,
    ddim_plan,
    ddpm_plan,
    dpm_solver_plan,
    run_plan,
    step_orders,
    time_nodes,
)
from recbole_mmdiff.diffusion.plans_pp import dpm_solver_pp_plan
from recbole_mmdiff.diffusion.process import (
    antithetic_steps,
    diffusion_loss,
    eps_from_x0,
    keyed_antithetic_steps,
    posterior,
    q_sample,
    x0_from_eps,
)
from recbole_mmdiff.diffusion.samplers import (
    ddim,
    ddpm,
    dpm_solver,
    dpm_solver_pp,
    keyed_noise,
    noise_from_x0,
    torch_noise,
)
from recbole_mmdiff.diffusion.schedule import CosineVPSchedule, NoiseSchedule, VPSchedule
from recbole_mmdiff.diffusion.unet import VectorUNet

__all__ = [
    "ACTIVATIONS",
    "AffineMap",
    "AffineParameters",
    "ConvUNet",
    "CosineVPSchedule",
    "DiscreteSchedule",
    "MLPDenoiser",
    "NoiseSchedule",
    "Plan",
    "Stage",
    "StaticTokens",
    "TokenAttention",
    "VPSchedule",
    "VectorUNet",
    "antithetic_steps",
    "collapse",
    "cosine_schedule",
    "ddim",
    "ddim_plan",
    "ddpm",
    "ddpm_plan",
    "diffusion_loss",
    "discrete_schedule",
    "dpm_solver",
    "dpm_solver_plan",
    "dpm_solver_pp",
    "dpm_solver_pp_plan",
    "drop_condition",
    "eps_from_x0",
    "exp_schedule",
    "fold_in",
    "guided_noise",
    "keyed_antithetic_steps",
    "keyed_noise",
    "keyed_normal",
    "keyed_uniform",
    "linear_schedule",
    "noise_from_x0",
    "posterior",
    "q_sample",
    "run_plan",
    "sample",
    "sinusoidal_embedding",
    "sqrt_schedule",
    "step_orders",
    "time_nodes",
    "torch_noise",
    "x0_from_eps",
]
