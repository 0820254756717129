// Everything is defined by now: open the plans, then the theme (which draws them once more in its colours).

for (const root of all("[data-plan]")) {
  const data = dataAfter(root);
  if (data.plans.length) new PlanView(root, data);
}

setUpTheme();
