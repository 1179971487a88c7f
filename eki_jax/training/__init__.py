"""The training loop, what it wants of an optimizer, and what it leaves behind."""

from eki_jax.training.checkpoints import Checkpoints as Checkpoints
from eki_jax.training.checkpoints import abstract as abstract
from eki_jax.training.loop import Result as Result
from eki_jax.training.loop import check_data as check_data
from eki_jax.training.loop import epoch as epoch
from eki_jax.training.loop import fit as fit
from eki_jax.training.method import Method as Method
from eki_jax.training.method import check_labels as check_labels
from eki_jax.training.method import ensemble_method as ensemble_method
from eki_jax.training.metrics import Accuracy as Accuracy
from eki_jax.training.metrics import classification_accuracy as classification_accuracy
