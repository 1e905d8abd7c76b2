import pytest

pytest.register_assert_rewrite('models.model_tester')
